"""Accelerators by proof: one counts only when a 64-bit guest really ran under it.

A /dev/kvm that opens isn't enough: in nested clouds and containers it may be there and yet not run an ordinary guest.
The proof costs a few QEMU starts (about 50 ms each), so it is kept until the machine or the binary changes.
"""

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from atoll.errors import ProcessFailed, StorageFailed, Unsupported, from_os_error
from atoll.host import facts, process
from atoll.host.files import make_folder, write_atomically
from atoll.host.payload import PAYLOADS
from atoll.layout import Layout
from atoll.model.spec import AcceleratorChoice, Arch

AcceleratorName = Literal["kvm", "hvf", "whpx", "tcg"]

PROOF_TIME = 5.0
"""Seconds. The payload takes a twentieth of one; the rest is for a machine on which everything starts at once."""

HARDWARE: dict[str, AcceleratorName] = {"linux": "kvm", "darwin": "hvf", "win32": "whpx"}
"""Which accelerator each system has, by Python's name of the system."""


class Accelerator(Struct, frozen=True, kw_only=True):
    """What was found out about an accelerator; `reason` says why it is usable, or why not."""

    name: AcceleratorName
    usable: bool
    reason: str


class Proofs(Struct, frozen=True, kw_only=True):
    """What `prove` found for one QEMU binary, and all that the finding hangs on."""

    key: tuple[str | int, ...]
    accelerators: list[Accelerator]


async def prove(layout: Layout, qemu_binary: Path) -> list[Accelerator]:
    """The accelerators of this system for the guests of that binary, the fastest first; kept in `layout.accelerator`.

    Raises `StorageFailed` when the binary can't be looked at, or there is no place for the payload.
    """
    key = _key(qemu_binary)
    kept = _kept(layout)
    proofs = kept.get(str(qemu_binary))
    if proofs is not None and proofs.key == key:
        return proofs.accelerators
    found = await _prove_anew(qemu_binary)
    _keep(layout, {**kept, str(qemu_binary): Proofs(key=key, accelerators=found)})
    return found


def choose(choice: AcceleratorChoice, proofs: list[Accelerator]) -> Accelerator:
    """The accelerator to use: the first that is usable, or the one that was asked for.

    Raises `Unsupported` with the reason when that one isn't usable, or none is.
    """
    for accelerator in proofs:
        if accelerator.usable and choice in ("auto", accelerator.name):
            return accelerator
    reasons = [f"{each.name}: {each.reason}" for each in proofs if choice in ("auto", each.name)]
    if choice == "auto":
        raise Unsupported("no accelerator can run this guest", "; ".join(reasons), "See `atoll doctor`.")
    raise Unsupported(
        f"the accelerator {choice} can't be used",
        reasons[0].partition(": ")[2] if reasons else f"{sys.platform} has no {choice}",
        "Leave the accelerator to Atoll (`auto`), which emulates where it must; `atoll doctor` says more.",
    )


async def _prove_anew(qemu_binary: Path) -> list[Accelerator]:
    arch = guest_architecture(qemu_binary)
    found = []
    name = HARDWARE.get(sys.platform)
    if name is not None:
        obstacle = _obstacle(name, arch)
        found.append(
            Accelerator(name=name, usable=False, reason=obstacle)
            if obstacle
            else await run_payload(qemu_binary, name, arch=arch)
        )
    return [*found, await run_payload(qemu_binary, "tcg", arch=arch)]


def guest_architecture(qemu_binary: Path) -> Arch:
    """The architecture of the guests that a QEMU runs, by its name. Raises `Unsupported` for one we don't know."""
    name = qemu_binary.name.removesuffix(".exe").removeprefix("qemu-system-")
    arch = facts.ARCHITECTURES.get(name)
    if arch is None:
        raise Unsupported(f"{qemu_binary} runs no guests that Atoll knows", next_step="See `atoll doctor`.")
    return arch


def _obstacle(name: AcceleratorName, arch: Arch) -> str:
    """What makes a proof needless; empty when nothing does."""
    if arch != facts.architecture():
        return f"it runs guests of this computer's own architecture ({facts.architecture()}) only, and this is {arch}"
    if name != "kvm":
        return ""
    return kvm_obstacle(facts.kvm_state(), facts.cpu().flags, arch)


def kvm_obstacle(state: facts.KvmState, flags: frozenset[str], arch: Arch) -> str:
    """What keeps KVM from running guests, by what is known without trying; empty when nothing does."""
    # The processor first: without its help no permission is of any use. Only x86 tells it in /proc/cpuinfo.
    if arch == "x86_64" and not flags & {"vmx", "svm"}:
        device = {
            "usable": "/dev/kvm opens, but ",
            "absent": "there is no /dev/kvm, and ",
            "forbidden": "/dev/kvm is there, but ",
            "broken": "/dev/kvm is there, but ",
        }[state]
        lack = "the processor has no vmx/svm flag"
        return f"{device}{lack}" + (
            ": this is a virtual machine that can't run others in hardware" if "hypervisor" in flags else ""
        )
    return {
        "usable": "",
        "absent": "there is no /dev/kvm",
        "forbidden": "/dev/kvm is there, but this user may not open it",
        "broken": "/dev/kvm is there, but it can't be opened",
    }[state]


async def run_payload(qemu_binary: Path, name: AcceleratorName, *, arch: Arch) -> Accelerator:
    """Start a tiny 64-bit guest and see whether it runs. Raises `StorageFailed`."""
    payload = PAYLOADS[arch]
    model = "max" if name == "tcg" else "host"
    try:
        with tempfile.NamedTemporaryFile(prefix="atoll-payload-") as file:
            file.write(payload.content)
            file.flush()
            argv: list[str | Path] = [
                qemu_binary,
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-m",
                "16",
                "-no-reboot",
            ]
            argv += ["-accel", name, "-cpu", model, *payload.arguments, file.name]
            async with asyncio.timeout(PROOF_TIME):
                finished = await process.run(argv, check=False)
    except TimeoutError:
        reason = f"a 64-bit guest did not run to its end within {PROOF_TIME:.0f} s"
        return Accelerator(name=name, usable=False, reason=reason)
    except ProcessFailed as error:
        return Accelerator(name=name, usable=False, reason=f"a 64-bit guest did not run: {error.text}")
    except OSError as error:
        raise from_os_error(error, "write the guest that proves an accelerator") from error
    if finished.exit_code == payload.exit_code:
        how = "QEMU's own emulation: it runs anywhere, many times slower" if name == "tcg" else "in hardware"
        return Accelerator(name=name, usable=True, reason=f"a 64-bit guest ran ({how})")
    reason = f"a 64-bit guest did not run: {process.failure([str(word) for word in argv], finished).text}"
    return Accelerator(name=name, usable=False, reason=reason)


def _key(qemu_binary: Path) -> tuple[str | int, ...]:
    """Whatever the findings hang on: this boot, this user, the device, the binary."""
    try:
        binary = qemu_binary.stat()
    except OSError as error:
        raise from_os_error(error, f"look at {qemu_binary}") from error
    device: tuple[int, ...] = ()
    if facts.KVM.exists():
        stat = facts.KVM.stat()
        device = (stat.st_rdev, stat.st_mode, stat.st_uid, stat.st_gid)
    owner = (facts.boot_id(), os.geteuid(), facts.kvm_state())
    return (*owner, *device, str(qemu_binary), binary.st_size, binary.st_mtime_ns)


def _kept(layout: Layout) -> dict[str, Proofs]:
    # Whatever is wrong with the file, it only has to be made again.
    try:
        return msgspec.json.decode(layout.accelerator.read_bytes(), type=dict[str, Proofs])
    except (OSError, msgspec.MsgspecError):
        return {}


def _keep(layout: Layout, proofs: dict[str, Proofs]) -> None:
    try:
        make_folder(layout.cache)
        write_atomically(layout.accelerator, msgspec.json.encode(proofs))
    except StorageFailed:
        # A full disk or a read-only home costs the next command its 0.1 s again; it mustn't fail this one.
        return
