"""The tiny image: Debian's cloud kernel, busybox and the guest agent on a small disk that lasts.

The initial RAM disk holds only what finds the root disk. The kernel is decompressed here, since under emulation the
guest takes a second for it.
"""

import asyncio
import hashlib
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import BuildFailed
from atoll.host import process
from atoll.host.files import sha256_of
from atoll.images.ext4 import Tree, disk_errors_told, make_ext4, to_qcow2
from atoll.images.initramfs import FIRST, GUEST, OTHER, make_initramfs
from atoll.images.kernel import decompressed
from atoll.images.made import Made, Report
from atoll.images.modules import ModuleSet, find_modules
from atoll.images.packages import Origin, fetch, find_origin, locate, open_archive, unpack
from atoll.layout import Layout
from atoll.model.image import Image, ImageDisk, Layer
from atoll.model.names import new_id
from atoll.model.operation import Progress
from atoll.model.spec import Arch, GuestSpec, Machine
from atoll.model.units import GIB, MIB

DISK_SIZE = 1 * GIB
MEMORY = 256 * MIB

_DEBIAN_KERNELS: dict[Arch, str] = {
    "x86_64": "linux-image-cloud-amd64",
    "aarch64": "linux-image-cloud-arm64",
    "riscv64": "linux-image-riscv64",
}
_UBUNTU_KERNEL = "linux-image-virtual"
_PROGRAMS = ("busybox-static", "e2fsprogs", "qemu-guest-agent", "sshfs")
_MACHINES: dict[Arch, Machine] = {"x86_64": "q35", "aarch64": "virt", "riscv64": "virt"}
_CONSOLES: dict[Arch, str] = {"x86_64": "ttyS0", "aarch64": "ttyAMA0", "riscv64": "ttyS0"}
_LOADERS: dict[Arch, str] = {
    "x86_64": "lib64/ld-linux-x86-64.so.2",
    "aarch64": "lib/ld-linux-aarch64.so.1",
    "riscv64": "lib/ld-linux-riscv64-lp64d.so.1",
}

_LATER = (
    "virtio_net", "virtio_rng", "virtio_balloon", "virtio_input", "virtio_mem", "virtio_gpu", "evdev", "button",
    "sr_mod", "cdrom", "isofs", "vfat", "nls_ascii", "nls_cp437", "nls_utf8", "nls_iso8859_1", "loop", "dm_mod",
    "squashfs", "overlay", "virtiofs", "tun", "veth", "bridge", "dummy", "macvlan", "8021q", "zram", "nbd",
    "vmw_vsock_virtio_transport", "e1000", "e1000e", "usb_storage", "xhci_pci", "pvpanic_pci", "pvpanic_mmio",
)  # fmt: skip

# `no_timer_check`: a loaded host delays the timer so much that the kernel gives up on it. The rest is start-up work
# that no guest here needs.
_CMDLINE = "quiet root=LABEL=root rw apparmor=0 audit=0 selinux=0 cryptomgr.notests"
_X86_CMDLINE = "no_timer_check"


@dataclass(frozen=True)
class _Parts:
    """What the packages gave."""

    folder: Path
    arch: Arch
    kernel: Path
    time: int
    """Of the kernel's package: the time of every file in the image."""

    @property
    def release(self) -> str:
        _, dash, release = self.kernel.name.partition("-")
        return release if dash else self.kernel.parent.name

    def program(self, name: str) -> Path:
        for folder in ("usr/sbin", "sbin", "usr/bin", "bin"):
            if (self.folder / folder / name).is_file():
                return self.folder / folder / name
        raise BuildFailed(f"the packages hold no {name}", "the distribution moved it elsewhere")


async def build_tiny(*, layout: Layout, folder: Path, arch: Arch, name: str, report: Report) -> Made:
    """Build the tiny image for `arch` from packages; everything is written into `folder`.

    Raises `BuildFailed`, `Unsupported` (no packages on this system), `MissingTool`, `ProcessFailed`, `StorageFailed`.
    """
    with disk_errors_told(folder):
        return await _build(layout, folder, arch, name=name, report=report)


async def _build(layout: Layout, folder: Path, arch: Arch, *, name: str, report: Report) -> Made:
    parts = await _get_packages(layout, folder, arch, report)
    report(Progress(step="make the kernel", done=0, total=3, unit="steps"))
    kernel, initrd, raw, layer = (folder / part for part in ("kernel", "initrd", "root.raw", "root.qcow2"))
    kernel.write_bytes(await decompressed(parts.kernel.read_bytes()))
    report(Progress(step="make the initial RAM disk", done=1, total=3, unit="steps"))
    files = await asyncio.to_thread(find_modules, parts.folder)
    initrd.write_bytes(await make_initramfs(parts.program("busybox"), files, time=parts.time))
    report(Progress(step="make the disk", done=2, total=3, unit="steps"))
    tree = await _make_root(parts, files)
    await asyncio.to_thread(tree.write_tar, folder / "root.tar")
    # The identity comes from the content: the same packages give the same bytes.
    identity = str(uuid.uuid5(uuid.NAMESPACE_OID, await asyncio.to_thread(sha256_of, folder / "root.tar")))
    await make_ext4(folder / "root.tar", raw, size=DISK_SIZE, label="root", identity=identity, time=parts.time)
    await to_qcow2(raw, layer)
    for leftover in (raw, folder / "root.tar"):
        leftover.unlink()
    await asyncio.to_thread(shutil.rmtree, parts.folder)
    report(Progress(step="make the disk", done=3, total=3, unit="steps"))
    return await asyncio.to_thread(_made, name, parts, kernel, initrd, layer)


async def _get_packages(layout: Layout, folder: Path, arch: Arch, report: Report) -> _Parts:
    report(Progress(step="read package lists"))
    origin = await find_origin()
    archive = await open_archive(layout, origin, codename=_codename(origin, arch), arch=arch)
    kernel = _DEBIAN_KERNELS[arch] if origin.distribution == "debian" else _UBUNTU_KERNEL
    packages = await locate(archive, [kernel, *_PROGRAMS], keep=_is_needed)
    debs = await fetch(layout, archive, packages, report=report)
    report(Progress(step="unpack packages"))
    tree = folder / "packages"
    await unpack(debs.values(), tree)
    # Newer kernels lie beside their modules.
    kernels = sorted([*(tree / "boot").glob("vmlinu?-*"), *tree.glob("usr/lib/modules/*/vmlinu?")])
    if not kernels:
        raise BuildFailed(f"the package {kernel} brought no kernel", "the distribution moved it elsewhere")
    return _Parts(folder=tree, arch=arch, kernel=kernels[0], time=int(kernels[0].stat().st_mtime))


def _codename(origin: Origin, arch: Arch) -> str:
    # riscv64 is in Debian from 13 on.
    return "trixie" if arch == "riscv64" and origin.codename == "bookworm" else origin.codename


def _is_needed(package: str) -> bool:
    """Whether the package may hold a program, a library or the kernel: not the kernel's tools, nor Perl."""
    if package in _PROGRAMS or package.startswith("linux-"):
        return True
    return package.startswith(("lib", "zlib")) and not package.startswith(("libperl", "libssl", "libsystemd-shared"))


async def _make_root(parts: _Parts, files: dict[str, Path]) -> Tree:
    tree = Tree(time=parts.time)
    for folder in ("bin", "sbin", "lib", *(["lib64"] if parts.arch == "x86_64" else [])):
        tree.folder(f"/usr/{folder}")
        tree.link(f"/{folder}", f"usr/{folder}")
    for folder in ("dev", "proc", "sys", "run", "mnt", "media", "opt", "srv", "usr/local/bin", "var/lib", "var/log"):
        tree.folder(f"/{folder}")
    tree.folder("/root", 0o700)
    tree.folder("/tmp", 0o1777)
    tree.folder("/var/tmp", 0o1777)
    tree.link("/var/run", "../run")
    _add_settings(tree, parts)
    await _add_programs(tree, parts)
    modules = ModuleSet(files)
    for each in (*FIRST, *OTHER, *_LATER):
        await modules.add(each)
    for each, content in modules.contents.items():
        tree.file(f"/usr/lib/modules/{parts.release}/{each}.ko", content)
    for each, text in modules.index().items():
        tree.file(f"/usr/lib/modules/{parts.release}/{each}", text)
    return tree


def _add_settings(tree: Tree, parts: _Parts) -> None:
    for script in ("start", "late", "network", "address", "hotplug", "grow", "end"):
        tree.file(f"/usr/lib/atoll/{script}", GUEST / script, 0o755)
    tree.file("/usr/sbin/shutdown", GUEST / "shutdown", 0o755)
    tree.file("/etc/acpi/PWRF/00000080", "#!/bin/sh\nexec /usr/sbin/shutdown -P\n", 0o755)
    tree.file("/etc/inittab", GUEST / "inittab")
    tree.file("/etc/passwd", GUEST / "passwd")
    tree.file("/etc/group", GUEST / "group")
    tree.file("/etc/shadow", "root:*:::::::\nuser:*:::::::\n", 0o600)
    tree.file("/etc/profile", GUEST / "profile")
    tree.file("/etc/shells", "/bin/sh\n")
    tree.file("/etc/hosts", "127.0.0.1 localhost\n")
    tree.file("/etc/hostname", "tiny\n")
    tree.link("/etc/resolv.conf", "../run/resolv.conf")
    tree.link("/etc/mtab", "../proc/self/mounts")
    version = parts.release.split("-")[0]
    os_release = f'ID=atoll-tiny\nNAME="Atoll tiny"\nPRETTY_NAME="Atoll tiny ({version})"\nVERSION_ID="{version}"\n'
    tree.file("/etc/os-release", os_release)
    tree.folder("/home/user", 0o755)


async def _add_programs(tree: Tree, parts: _Parts) -> None:
    busybox = parts.program("busybox")
    tree.file("/usr/bin/busybox", busybox, 0o755)
    for applet in await _applets(busybox):
        if applet not in ("busybox", "dpkg", "dpkg-deb", "rpm", "rpm2cpio", "mke2fs"):
            tree.link(f"/usr/bin/{applet}", "busybox")
    # The kernel and the agent look for these in /sbin.
    for applet in ("init", "modprobe", "poweroff", "reboot", "halt"):
        tree.link(f"/usr/sbin/{applet}", "../bin/busybox")
    programs = [parts.program(name) for name in ("qemu-ga", "resize2fs", "sshfs")]
    for program in programs:
        tree.file(f"/usr/sbin/{program.name}", program, 0o755)
    loader = _LOADERS[parts.arch]
    libraries = await _libraries(parts, programs)
    tree.file(f"/usr/{loader}", libraries.pop(Path(loader).name), 0o755)
    for each in sorted(libraries):
        tree.file(f"/usr/lib/{each}", libraries[each])


async def _applets(busybox: Path) -> list[str]:
    """The names that this busybox serves, read out of the program: one of another architecture can't be asked."""
    # It keeps them sorted as one run of zero-terminated strings that starts with these two.
    content = busybox.read_bytes()
    start = content.find(b"[\0[[\0")
    end = content.find(b"\0\0", start)
    if start < 0:
        raise BuildFailed("busybox doesn't say what it serves", "it is built in an unknown way")
    return [name.decode() for name in content[start:end].split(b"\0") if name]


async def _libraries(parts: _Parts, programs: list[Path]) -> dict[str, Path]:
    """The shared libraries that the programs need, and those that these need, by name."""
    everywhere = {path.name: path for path in sorted(parts.folder.rglob("*.so*")) if path.is_file()}
    found: dict[str, Path] = {}
    missing: list[Path] = programs
    while missing:
        told = await process.run(["readelf", "-dW", *missing], env={"LC_ALL": "C"})
        names = sorted(set(re.findall(r"\(NEEDED\).*\[([^]]+)\]", told.text)) - found.keys())
        for each in names:
            if each not in everywhere:
                raise BuildFailed(
                    f"the library {each} is in none of the packages", "the distribution moved it elsewhere"
                )
            found[each] = everywhere[each].resolve()
        missing = [found[each] for each in names]
    loader = Path(_LOADERS[parts.arch]).name
    found.setdefault(loader, everywhere[loader].resolve())
    return found


def _made(name: str, parts: _Parts, kernel: Path, initrd: Path, layer: Path) -> Made:
    kernel_sum, initrd_sum, layer_sum = sha256_of(kernel), sha256_of(initrd), sha256_of(layer)
    record = Layer(id=new_id(), virtual_size=DISK_SIZE, file_size=layer.stat().st_size, sha256=layer_sum)
    words = [f"console={_CONSOLES[parts.arch]}", _CMDLINE, *([_X86_CMDLINE] if parts.arch == "x86_64" else [])]
    image = Image(
        id=new_id(),
        name=name,
        arch=parts.arch,
        created_at=time.time(),
        source="build",
        sha256=hashlib.sha256(f"{kernel_sum} {initrd_sum} {layer_sum}".encode()).hexdigest(),
        disks=(ImageDisk(name="root", size=DISK_SIZE, layer=record.id),),
        firmware="kernel",
        firmwares=("kernel",),
        kernel=kernel_sum,
        initrd=initrd_sum,
        cmdline=" ".join(words),
        machine=_MACHINES[parts.arch],
        memory=MEMORY,
        display=False,
        guest=GuestSpec(agent=True, seed="cmdline"),
        description=f"A small Linux {parts.release} with busybox and the guest agent",
    )
    return Made(image=image, layers=((layer, record),), blobs=((kernel, kernel_sum), (initrd, initrd_sum)))
