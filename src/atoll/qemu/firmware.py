"""UEFI firmware by QEMU's own descriptor files (docs/interop/firmware.json in QEMU's source).

The folders are searched as that document says: a file name found in an earlier folder hides the same name in later
ones; an empty file hides it altogether; then the names are taken in order, the first that fits wins.
"""

import fnmatch
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from atoll.errors import Unsupported
from atoll.model.launch import Firmware

# Features that need more than a plain machine: SMM set up with a secure pflash. `amd-sev` and its like only say that
# the firmware can serve a confidential guest too; Debian's plain OVMF has it.
_UNWANTED = frozenset({"requires-smm", "secure-boot", "enrolled-keys"})


class _Target(Struct):
    architecture: str
    machines: tuple[str, ...]


class _File(Struct):
    filename: str
    format: Literal["raw", "qcow2"] = "raw"

    @property
    def there(self) -> bool:
        return os.path.isfile(self.filename)  # noqa: PTH113  # unlike Path.is_file it is False where we may not look


class _Mapping(Struct, rename="kebab"):
    device: str
    mode: str = "split"
    executable: _File | None = None
    nvram_template: _File | None = None


class Descriptor(Struct, rename="kebab"):
    """What is asked of a descriptor file; it may say more."""

    interface_types: tuple[str, ...]
    mapping: _Mapping
    targets: tuple[_Target, ...]
    features: tuple[str, ...] = ()
    description: str = ""


_decode = msgspec.json.Decoder(Descriptor).decode


def folders(environment: dict[str, str] | None = None) -> list[Path]:
    """Where descriptors are, the user's own first."""
    env = dict(os.environ) if environment is None else environment
    config, home = Path(env.get("XDG_CONFIG_HOME", "")), Path(env.get("HOME", ""))
    own = config if config.is_absolute() else home / ".config"
    return [
        *([own / "qemu/firmware"] if own.is_absolute() else []),
        Path("/etc/qemu/firmware"),
        Path("/usr/local/share/qemu/firmware"),
        Path("/usr/share/qemu/firmware"),
    ]


def read_descriptors(where: Iterable[Path]) -> list[Descriptor]:
    """The descriptors that count, in their order. A damaged one is passed over, as QEMU's document asks."""
    found: dict[str, Path] = {}
    for folder in where:
        for name in _names(folder):
            found.setdefault(name, folder / name)
    descriptors = []
    for name in sorted(found):
        try:
            descriptors.append(_decode(found[name].read_bytes()))
        except (OSError, ValueError):
            # Also an empty file: it only hides others.
            continue
    return descriptors


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.suffix == ".json"]
    except OSError:
        return []


def choose(descriptors: Sequence[Descriptor], *, arch: str, machine_type: str) -> Firmware:
    """The first plain UEFI firmware for this machine. Raises `Unsupported` with the package to install."""
    for descriptor in descriptors:
        firmware = _fitting(descriptor, arch=arch, machine_type=machine_type)
        if firmware is not None:
            return firmware
    package = {"x86_64": "ovmf", "aarch64": "qemu-efi-aarch64", "riscv64": "qemu-efi-riscv64"}.get(arch, "ovmf")
    raise Unsupported(
        f"there is no UEFI firmware for {arch} ({machine_type})",
        "no descriptor in /usr/share/qemu/firmware fits",
        f"Install it: `sudo apt-get install {package}`.",
    )


def _fitting(descriptor: Descriptor, *, arch: str, machine_type: str) -> Firmware | None:
    mapping = descriptor.mapping
    code, variables = mapping.executable, mapping.nvram_template
    fits = any(
        target.architecture == arch and any(fnmatch.fnmatchcase(machine_type, glob) for glob in target.machines)
        for target in descriptor.targets
    )
    if (
        not fits
        or "uefi" not in descriptor.interface_types
        or (mapping.device, mapping.mode) != ("flash", "split")
        or _UNWANTED & set(descriptor.features)
        or code is None
        or variables is None
        or not (code.there and variables.there)
    ):
        return None
    return Firmware(
        code=code.filename,
        code_format=code.format,
        variables=variables.filename,
        variables_format=variables.format,
        description=descriptor.description,
    )
