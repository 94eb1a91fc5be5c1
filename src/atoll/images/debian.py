"""Debian images by mmdebstrap, without root and without a loop device: bootable directly and by UEFI."""

import asyncio
import hashlib
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atoll.errors import BuildFailed, MissingTool, ProcessFailed, Unsupported
from atoll.host import process
from atoll.host.files import sha256_of
from atoll.images.ext4 import disk_errors_told, make_ext4, to_qcow2
from atoll.images.initramfs import GUEST, make_initramfs
from atoll.images.kernel import decompressed
from atoll.images.made import Made, Report
from atoll.images.modules import find_modules
from atoll.images.packages import DPKG_ARCH, Archive, Origin, find_origin, open_archive
from atoll.layout import Layout
from atoll.model.image import Image, ImageDisk, Layer
from atoll.model.names import new_id
from atoll.model.operation import Progress
from atoll.model.spec import Arch, Firmware, GuestSpec
from atoll.model.units import GIB, MIB

Release = Literal["12", "13"]
CODENAMES: dict[Release, str] = {"12": "bookworm", "13": "trixie"}
DISK_SIZE = 8 * GIB
MEMORY = 512 * MIB

_ESP_START, _ESP_SIZE = 1 * MIB, 127 * MIB
_ROOT_START = _ESP_START + _ESP_SIZE
# The second copy of the partition table takes the disk's last 33 sectors.
_ROOT_SIZE = DISK_SIZE - _ROOT_START - 1 * MIB
_PACKAGES = (
    "apt", "busybox-static", "ca-certificates", "cloud-guest-utils", "cloud-init", "dbus", "e2fsprogs", "iproute2",
    "less", "libpam-systemd", "login", "netbase", "openssh-server", "procps", "qemu-guest-agent", "sshfs", "sudo",
    "systemd-resolved", "systemd-sysv", "systemd-timesyncd", "udev",
)  # fmt: skip
_KERNELS: dict[Arch, str] = {
    "x86_64": "linux-image-cloud-amd64",
    "aarch64": "linux-image-cloud-arm64",
    "riscv64": "linux-image-riscv64",
}
_CONSOLES: dict[Arch, str] = {"x86_64": "ttyS0", "aarch64": "ttyAMA0", "riscv64": "ttyS0"}
_CMDLINE = "quiet root=LABEL=root rw apparmor=0 audit=0 selinux=0"
_STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")


@dataclass(frozen=True)
class _Plan:
    folder: Path
    release: Release
    arch: Arch
    time: int

    @property
    def cmdline(self) -> str:
        # A loaded host delays the timer so much that the kernel gives up on it.
        words = [f"console={_CONSOLES[self.arch]}", _CMDLINE, *(["no_timer_check"] if self.arch == "x86_64" else [])]
        return " ".join(words)

    def identity(self, what: str) -> str:
        """A UUID for a part of the disk: the same release and packages give the same disk."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"atoll debian {self.release} {self.arch} {self.time} {what}"))


async def build_debian(
    *, layout: Layout, folder: Path, release: Release, arch: Arch, name: str, report: Report
) -> Made:
    """Build Debian 12 or 13 from packages; everything is written into `folder`.

    Raises `BuildFailed`, `Unsupported`, `MissingTool`, `ProcessFailed`, `StorageFailed`.
    """
    codename = CODENAMES[release]
    origin = await find_origin()
    if origin.distribution != "debian":
        raise Unsupported(
            "Debian images are built on Debian only",
            "this machine's package sources name no Debian mirror",
            f"Pull the published image instead: `atoll image pull debian:{release}`.",
        )
    report(Progress(step="read package lists"))
    archive = await open_archive(layout, origin, codename=codename, arch=arch)
    newest = max(path.stat().st_mtime for path in archive.folder.glob("lists/*Release"))
    plan = _Plan(folder=folder, release=release, arch=arch, time=int(newest))
    with disk_errors_told(folder):
        await _bootstrap(plan, origin, archive, report)
        report(Progress(step="make the kernel"))
        kernel, initrd = await _make_boot_files(plan)
        report(Progress(step="make the disk"))
        layer, firmwares = await _make_disk(plan, initrd)
    return await asyncio.to_thread(_made, plan, name, (kernel, initrd, layer), firmwares)


async def _bootstrap(plan: _Plan, origin: Origin, archive: Archive, report: Report) -> None:
    """Install the packages into `root.tar`, and copy out what the boot needs."""
    out = plan.folder / "out"
    out.mkdir()
    # The image's own sources: without the backports, which would bring their kernel at the next upgrade, and
    # without the path of this machine's keyring.
    sources = [line for line in archive.sources if "backports" not in line]
    settings = [f"--aptopt={line}" for line in origin.settings]
    # What root's build mounts goes with it, however it ends; a user's has a namespace of its own anyway.
    own_mounts = ["unshare", "--mount"] if os.getuid() == 0 else []
    argv = [
        *own_mounts, "mmdebstrap", "--variant=minbase", f"--architectures={DPKG_ARCH[plan.arch]}",
        f"--include={','.join((*_PACKAGES, _KERNELS[plan.arch]))}",
        *settings, '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        f"--customize-hook=copy-in {shlex.quote(str(GUEST / 'debian'))} /",
        '--customize-hook=chroot "$1" sh /debian/customize',
        f"--customize-hook=copy-out /boot /usr/lib/modules /usr/bin/busybox {shlex.quote(str(out))}",
        "--format=tar", CODENAMES[plan.release], str(plan.folder / "root.tar"), *sources,
    ]  # fmt: skip
    environment = {"SOURCE_DATE_EPOCH": str(plan.time), "INITRD": "No", "LC_ALL": "C"}
    # A user's build runs as one of the user's subordinate ids, who can't enter the user's own folders.
    environment["TMPDIR"] = str(plan.folder) if os.getuid() == 0 else tempfile.gettempdir()
    try:
        await process.run(argv, env=environment, on_line=_progress_of(report))
    except ProcessFailed as error:
        next_step = error.next_step
        if "chroot mode" in error.why:
            next_step = (
                "An ordinary user needs subordinate ids: `sudo apt-get install uidmap` and "
                "`sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $USER`."
            )
        raise BuildFailed(f"Debian {plan.release} couldn't be installed", error.why, next_step) from error


def _progress_of(report: Report) -> Callable[[str], None]:
    """Progress out of what mmdebstrap says: `I: step…` lines, and apt's percentages in between."""
    step = "install packages"

    def hear(line: str) -> None:
        nonlocal step
        if said := re.match(r"I: (.+?)(?:\.\.\.)?$", line):
            step = f"install packages: {said[1]}"
            report(Progress(step=step))
        elif percent := re.search(r"(\d+)\.\d+%|\b(\d+)%", line):
            report(Progress(step=step, done=float(percent[1] or percent[2]), total=100, unit="percent"))

    return hear


async def _make_boot_files(plan: _Plan) -> tuple[Path, Path]:
    """The kernel as QEMU starts it quickest, and the initial RAM disk."""
    out = plan.folder / "out"
    kernel, initrd = plan.folder / "kernel", plan.folder / "initrd"
    kernel.write_bytes(await decompressed(_packaged_kernel(plan).read_bytes()))
    modules = await asyncio.to_thread(find_modules, out / "modules")
    initrd.write_bytes(await make_initramfs(out / "busybox", modules, time=plan.time))
    return kernel, initrd


def _packaged_kernel(plan: _Plan) -> Path:
    kernels = sorted((plan.folder / "out" / "boot").glob("vmlinu?-*"))
    if not kernels:
        raise BuildFailed(f"Debian {plan.release} has no kernel for {plan.arch}", "its package brought none")
    return kernels[-1]


async def _make_disk(plan: _Plan, initrd: Path) -> tuple[Path, tuple[Firmware, ...]]:
    """The partitioned disk, and the ways in which it boots: UEFI only where this machine has the stub for it."""
    raw, layer, tar = (plan.folder / name for name in ("root.raw", "root.qcow2", "root.tar"))
    with raw.open("xb") as file:
        file.truncate(DISK_SIZE)
    await _partition(plan, raw)
    identity = plan.identity("root file system")
    await make_ext4(tar, raw, size=_ROOT_SIZE, label="root", identity=identity, time=plan.time, offset=_ROOT_START)
    uefi = plan.arch == "x86_64"
    if uefi:
        await _fill_esp(plan, raw, initrd)
    await to_qcow2(raw, layer)
    for leftover in (raw, tar):
        leftover.unlink()
    await asyncio.to_thread(shutil.rmtree, plan.folder / "out")
    return layer, ("kernel", "uefi") if uefi else ("kernel",)


async def _partition(plan: _Plan, raw: Path) -> None:
    script = (
        f"label: gpt\nlabel-id: {plan.identity('disk')}\nunit: sectors\nsector-size: 512\n"
        f"start={_ESP_START // 512}, size={_ESP_SIZE // 512}, type=U, name=esp, uuid={plan.identity('esp')}\n"
        f"start={_ROOT_START // 512}, size={_ROOT_SIZE // 512}, type=L, name=root, uuid={plan.identity('root')}\n"
    )
    await process.run(["sfdisk", "--quiet", raw], stdin=script.encode())


async def _fill_esp(plan: _Plan, raw: Path, initrd: Path) -> None:
    """An EFI system partition with one program, at the place where every firmware looks."""
    esp, uki = plan.folder / "esp.raw", plan.folder / "uki.efi"
    await _make_uki(plan, uki, initrd)
    with esp.open("xb") as file:
        file.truncate(_ESP_SIZE)
    environment = {"SOURCE_DATE_EPOCH": str(plan.time), "MTOOLS_SKIP_CHECK": "1"}
    await process.run(["mkfs.vfat", "--invariant", "-F", "32", "-n", "ESP", esp], env=environment)
    await process.run(["mmd", "-i", esp, "::/EFI", "::/EFI/BOOT"], env=environment)
    await process.run(["mcopy", "-m", "-i", esp, uki, "::/EFI/BOOT/BOOTX64.EFI"], env=environment)
    dd = ["dd", f"if={esp}", f"of={raw}", "bs=1M", f"seek={_ESP_START // MIB}", "conv=notrunc,sparse", "status=none"]
    await process.run(dd)
    for leftover in (esp, uki):
        leftover.unlink()


async def _make_uki(plan: _Plan, uki: Path, initrd: Path) -> None:
    """A unified kernel image: the stub with command line, kernel and initial RAM disk as sections behind its own.

    systemd-stub(7) names the sections; each starts at the next free page, `.linux` after the rest, since the kernel
    may be decompressed over what follows it.
    """
    if not _STUB.exists():
        raise MissingTool("the UEFI stub is not installed", next_step="`sudo apt-get install systemd-boot-efi`.")
    cmdline = plan.folder / "cmdline"
    cmdline.write_text(plan.cmdline)
    headers = await process.run(["objdump", "-hw", _STUB], env={"LC_ALL": "C"})
    sections = re.findall(r"^\s*\d+ \S+\s+([0-9a-f]+)\s+([0-9a-f]+)", headers.text, re.MULTILINE)
    address = max(int(start, 16) + int(size, 16) for size, start in sections)
    words: list[str | Path] = ["objcopy"]
    for section, path in ((".cmdline", cmdline), (".initrd", initrd), (".linux", _packaged_kernel(plan))):
        address = -(-address // 4096) * 4096
        words += ["--add-section", f"{section}={path}", "--change-section-vma", f"{section}={address:#x}"]
        address += path.stat().st_size
    await process.run([*words, _STUB, uki])
    os.utime(uki, (plan.time, plan.time))
    cmdline.unlink()


def _made(plan: _Plan, name: str, files: tuple[Path, Path, Path], firmwares: tuple[Firmware, ...]) -> Made:
    kernel, initrd, layer = files
    kernel_sum, initrd_sum, layer_sum = sha256_of(kernel), sha256_of(initrd), sha256_of(layer)
    record = Layer(id=new_id(), virtual_size=DISK_SIZE, file_size=layer.stat().st_size, sha256=layer_sum)
    image = Image(
        id=new_id(),
        name=name,
        arch=plan.arch,
        created_at=time.time(),
        source="build",
        sha256=hashlib.sha256(f"{kernel_sum} {initrd_sum} {layer_sum}".encode()).hexdigest(),
        disks=(ImageDisk(name="root", size=DISK_SIZE, layer=record.id),),
        firmware="kernel",
        firmwares=firmwares,
        kernel=kernel_sum,
        initrd=initrd_sum,
        cmdline=plan.cmdline,
        machine="q35" if plan.arch == "x86_64" else "virt",
        memory=MEMORY,
        display=False,
        guest=GuestSpec(agent=True, seed="nocloud"),
        description=f"Debian {plan.release} ({CODENAMES[plan.release]}) from packages",
    )
    return Made(image=image, layers=((layer, record),), blobs=((kernel, kernel_sum), (initrd, initrd_sum)))
