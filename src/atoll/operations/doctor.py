"""Looks at this computer for whatever Atoll needs: what was found, what that means, and the command that mends it."""

import asyncio
import io
import os
import pwd
import tarfile
import tempfile
from pathlib import Path
from typing import Literal, get_args

from atoll.errors import AtollError, MissingTool, Unsupported, from_os_error
from atoll.host import accelerator, facts, process
from atoll.host.checks import Check, kernel_features, resources
from atoll.host.files import make_folder
from atoll.host.sandbox import own_ids, usable_namespaces
from atoll.host.spawn import users_refused
from atoll.layout import Layout
from atoll.model.spec import Arch
from atoll.operations.services import Services
from atoll.qemu import firmware, probe

FIRMWARE_PACKAGES: dict[Arch, str] = {"x86_64": "ovmf", "aarch64": "qemu-efi-aarch64", "riscv64": "qemu-efi-riscv64"}


async def examine(services: Services) -> list[Check]:
    """All checks, in the order in which a reader should mend them. Takes about a second; raises nothing."""
    layout = services.layout
    engines = await asyncio.gather(*(_engine(services, arch) for arch in get_args(Arch)))
    return [
        *engines,
        *await _accelerators(layout),
        *[await _firmware(services, arch) for arch in get_args(Arch)],
        *_tools(),
        await _archive_reader(),
        _sub_ids(),
        *_folders(layout),
        _records(services),
        *resources(layout),
        *kernel_features(),
    ]


def _install(package: str) -> str:
    return f"sudo apt-get install {package}"


async def _engine(services: Services, arch: Arch) -> Check:
    name, program = f"QEMU for {arch}", probe.BINARIES[arch]
    vital = arch == facts.architecture()
    meaning = f"{arch} guests can't run"
    try:
        caps = await services.capabilities(arch)
    except MissingTool:
        remedy = _install(process.PACKAGES[program])
        return Check(name=name, ok=_bad(vital), found="not installed", meaning=meaning, remedy=remedy)
    except Unsupported as error:
        return Check(name=name, ok=_bad(vital), found=error.what, meaning=error.why, remedy=error.next_step)
    except (AtollError, OSError) as error:
        return Check(name=name, ok=_bad(vital), found=str(error), meaning=meaning, remedy=_reinstall(program))
    return Check(name=name, ok="ok", found=f"{caps.binary}, version {caps.version_text}")


def _bad(vital: bool) -> Literal["warning", "failed"]:
    return "failed" if vital else "warning"


def _reinstall(program: str) -> str:
    return f"sudo apt-get install --reinstall {process.PACKAGES.get(program, program)}"


async def _accelerators(layout: Layout) -> list[Check]:
    program = f"qemu-system-{facts.architecture()}"
    try:
        proofs = await accelerator.prove(layout, Path(process.find(program)))
    except AtollError as error:
        meaning = "without QEMU nothing can be said about accelerators"
        return [Check(name="Accelerator", ok="failed", found=str(error), meaning=meaning, remedy=error.next_step)]
    return [_accelerator(proof) for proof in proofs]


def _accelerator(proof: accelerator.Accelerator) -> Check:
    name = f"Accelerator {proof.name}"
    if proof.usable:
        return Check(name=name, ok="ok", found=proof.reason)
    if proof.name == "tcg":
        meaning, remedy = "guests of other architectures can't run", _reinstall(f"qemu-system-{facts.architecture()}")
    else:
        meaning, remedy = "guests run in software, many times slower, and just as correctly", _kvm_remedy()
    return Check(name=name, ok="warning", found=proof.reason, meaning=meaning, remedy=remedy)


def _kvm_remedy() -> str:
    state, flags = facts.kvm_state(), facts.cpu().flags
    if facts.architecture() == "x86_64" and not flags & {"vmx", "svm"}:
        if "hypervisor" in flags:
            return "this computer is a virtual machine itself: switch on nested virtualization where it is hosted"
        return "switch on virtualization (VT-x, AMD-V) in the computer's firmware settings"
    if state == "forbidden":
        return f"sudo usermod --append --groups kvm {_user_name()}, then log in again"
    if state == "absent":
        return f"sudo modprobe {'kvm_intel' if 'vmx' in flags else 'kvm_amd' if 'svm' in flags else 'kvm'}"
    return "sudo dmesg | grep -i kvm (the kernel says there what is wrong with it)"


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


async def _firmware(services: Services, arch: Arch) -> Check:
    name = f"UEFI for {arch}"
    try:
        machines = (await services.capabilities(arch)).machines
        machine_type = machines["q35" if arch == "x86_64" else "virt"]
        found = firmware.choose(firmware.read_descriptors(firmware.folders()), arch=arch, machine_type=machine_type)
    except (AtollError, OSError) as error:
        why = error.why if isinstance(error, AtollError) else str(error)
        others = " or by BIOS" if arch == "x86_64" else ""
        meaning = f"{arch} guests boot from a kernel given directly{others} only"
        remedy = _install(FIRMWARE_PACKAGES[arch]) + (" (Debian 13 and newer)" if arch == "riscv64" else "")
        return Check(name=name, ok="warning", found=why or str(error), meaning=meaning, remedy=remedy)
    return Check(name=name, ok="ok", found=found.code)


def _tool(program: str, purpose: str, *, vital: bool = False) -> Check:
    try:
        return Check(name=program, ok="ok", found=process.find(program))
    except MissingTool:
        remedy = _install(process.PACKAGES.get(program, program))
        return Check(name=program, ok=_bad(vital), found="not installed", meaning=purpose, remedy=remedy)


def _tools() -> list[Check]:
    return [
        _tool("qemu-img", "no disk can be made or converted", vital=True),
        _tool("slirp4netns", "VMs have no network: they need --network none", vital=True),
        _tool("sftp-server", "folders can't be shared with guests (-v)"),
        _tool("mmdebstrap", "`atoll image build debian:*` doesn't work"),
        _tool("newuidmap", "an ordinary user can't build Debian images, nor give VMs users of their own"),
        _tool("sfdisk", "UEFI disks can't be built"),
        _tool("mkfs.vfat", "UEFI disks can't be built"),
        _tool("mcopy", "UEFI disks can't be built"),
        _tool("objcopy", "UEFI disks can't be built"),
        _boot_stub(),
        _tool("dpkg-deb", "`atoll image build` can't unpack packages"),
        _tool("zstd", "kernels packed with it can't be unpacked"),
    ]


def _boot_stub() -> Check:
    folder = Path("/usr/lib/systemd/boot/efi")
    stubs = sorted(folder.glob("linux*.efi.stub")) if folder.is_dir() else []
    if stubs:
        return Check(name="UEFI boot stub", ok="ok", found=", ".join(map(str, stubs)))
    remedy = _install("systemd-boot-efi")
    return Check(name="UEFI boot stub", ok="warning", found=f"none in {folder}", meaning="no UEFI disks", remedy=remedy)


async def _archive_reader() -> Check:
    """Tries it: whether mke2fs reads archives depends on its version, its build, and a library found at run time."""
    name, program = "mke2fs from an archive", "mke2fs"
    meaning = "root file systems of built images can't be made without root"
    remedy = "sudo apt-get install e2fsprogs libarchive13t64 (at least e2fsprogs 1.47.1; Debian 12: see ./dev setup)"
    try:
        with tempfile.TemporaryDirectory(prefix="atoll-doctor-") as folder:
            archive, disk = Path(folder, "root.tar"), Path(folder, "disk")
            with tarfile.open(archive, "w") as tar:
                tar.addfile(tarfile.TarInfo("hello"), io.BytesIO())
            await process.run([program, "-q", "-t", "ext4", "-O", "^has_journal", "-d", archive, disk, "1M"])
    except MissingTool as error:
        return Check(name=name, ok="warning", found=error.what, meaning=meaning, remedy=error.next_step)
    except (AtollError, OSError) as error:
        return Check(name=name, ok="warning", found=str(error), meaning=meaning, remedy=remedy)
    return Check(name=name, ok="ok", found=process.find(program))


def _sub_ids() -> Check:
    name, user = "Subordinate ids", _user_name()
    if os.getuid() == 0:
        return Check(name=name, ok="ok", found="not needed by root")
    lacking = [file for file in ("/etc/subuid", "/etc/subgid") if not _lists_user(Path(file), user)]
    if not lacking:
        return _tried_ids(name)
    return Check(
        name=name,
        ok="warning",
        found=f"{user} has none in {' and '.join(lacking)}",
        meaning="this user can't build Debian images, and its VMs run as itself",
        remedy=f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
    )


def _tried_ids(name: str) -> Check:
    ids = own_ids("0" * 8)
    try:
        refused = users_refused(ids) if ids is not None and usable_namespaces().usable else ""
    except AtollError as error:
        refused = str(error)
    if not refused:
        return Check(name=name, ok="ok", found="in /etc/subuid and /etc/subgid")
    meaning = "this user's VMs run as itself"
    return Check(name=name, ok="warning", found=refused, meaning=meaning, remedy=_reinstall("newuidmap"))


def _lists_user(file: Path, user: str) -> bool:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return False
    # subuid(5): name or number, first id, count; fewer than 65536 don't hold a distribution's users.
    entries = [line.split(":") for line in lines]
    return any(len(e) == 3 and e[0] in (user, str(os.getuid())) and int(e[2] or 0) >= 65536 for e in entries)


def _folders(layout: Layout) -> list[Check]:
    return [
        _folder("Data folder", layout.data, "XDG_DATA_HOME"),
        _folder("Runtime folder", layout.run, "XDG_DATA_HOME"),
        _folder("Cache folder", layout.cache, "XDG_CACHE_HOME"),
    ]


def _folder(name: str, path: Path, variable: str) -> Check:
    try:
        make_folder(path)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"written")
    except AtollError as error:
        found = str(error)
    except OSError as error:
        found = str(from_os_error(error, f"write into {path}"))
    else:
        return Check(name=name, ok="ok", found=str(path))
    remedy = f"make it writable, or set ATOLL_HOME (or {variable}) to a folder that is"
    return Check(name=name, ok="failed", found=found, meaning="Atoll has no place for its things", remedy=remedy)


def _records(services: Services) -> Check:
    try:
        count = len(services.records.vms())
    except AtollError as error:
        meaning = f"VMs and images are known by {services.layout.database} only"
        return Check(name="Records", ok="failed", found=str(error), meaning=meaning, remedy=error.next_step)
    return Check(name="Records", ok="ok", found=f"{count} VMs")
