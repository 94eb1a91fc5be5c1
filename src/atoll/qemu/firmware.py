"""UEFI firmware by QEMU's own descriptor files (docs/interop/firmware.json in QEMU's source).

The folders are searched as that document says: a file name found in an earlier folder hides the same name in later
ones; an empty file hides it altogether; then the names are taken in order, the first that fits wins.
"""

import fnmatch
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from atoll.errors import Unsupported
from atoll.model.launch import Firmware

# Features that need more than a plain machine: SMM set up with a secure pflash. `amd-sev` and its like only say that
# the firmware can serve a confidential guest too; Debian's plain OVMF has it.
_UNWANTED = frozenset({"requires-smm", "secure-boot", "enrolled-keys"})


def folders(environment: dict[str, str] | None = None) -> list[Path]:
    """Where descriptors are, the user's own first."""
    env = dict(os.environ) if environment is None else environment
    config = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/root")) / ".config")
    return [
        config / "qemu/firmware",
        Path("/etc/qemu/firmware"),
        Path("/usr/local/share/qemu/firmware"),
        Path("/usr/share/qemu/firmware"),
    ]


def read_descriptors(where: Iterable[Path]) -> list[dict[str, Any]]:
    """The descriptors that count, in their order. A damaged one is passed over, as QEMU's document asks."""
    found: dict[str, Path] = {}
    for folder in where:
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            found.setdefault(path.name, path)
    descriptors = []
    for name in sorted(found):
        try:
            text = found[name].read_text()
            descriptor = json.loads(text) if text.strip() else None
        except (OSError, ValueError):
            continue
        if isinstance(descriptor, dict):
            descriptors.append(descriptor)
    return descriptors


def choose(descriptors: Sequence[dict[str, Any]], *, arch: str, machine_type: str) -> Firmware:
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


def _fitting(descriptor: dict[str, Any], *, arch: str, machine_type: str) -> Firmware | None:
    mapping = descriptor.get("mapping", {})
    targets = descriptor.get("targets", [])
    fits = any(
        target.get("architecture") == arch
        and any(fnmatch.fnmatchcase(machine_type, glob) for glob in target.get("machines", []))
        for target in targets
    )
    if (
        not fits
        or "uefi" not in descriptor.get("interface-types", [])
        or mapping.get("device") != "flash"
        or mapping.get("mode", "split") != "split"
        or _UNWANTED & set(descriptor.get("features", []))
    ):
        return None
    code, variables = mapping.get("executable", {}), mapping.get("nvram-template", {})
    if not Path(code.get("filename", "")).is_file() or not Path(variables.get("filename", "")).is_file():
        return None
    return Firmware(
        code=code["filename"],
        code_format=code.get("format", "raw"),
        variables=variables["filename"],
        variables_format=variables.get("format", "raw"),
        description=descriptor.get("description", ""),
    )
