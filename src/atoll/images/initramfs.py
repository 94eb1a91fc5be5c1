"""The initial RAM disk of built images: a busybox that finds the root disk and hands over, in a quarter of a second."""

import asyncio
from pathlib import Path

from atoll.images.ext4 import Tree
from atoll.images.modules import ModuleSet

GUEST = Path(__file__).with_name("guest")
FIRST = ("virtio_pci", "virtio_console", "virtio_blk", "crc32c_generic", "ext4")
"""Modules loaded before the root disk is looked for. ext4 asks for crc32c without depending on it; most kernels have
that built in, riscv64's hasn't.
"""
OTHER = ("virtio_mmio", "virtio_scsi", "sd_mod", "nvme", "ahci")
"""Modules loaded only when there is no virtio disk."""


async def make_initramfs(busybox: Path, modules: dict[str, Path], *, time: int) -> bytes:
    """The initial RAM disk, not compressed: unpacking is slow under emulation. `modules` are all of the kernel's.

    `time`, in seconds since 1970, is that of every file. Raises `BuildFailed`.
    """
    tree = Tree(time=time)
    tree.file("/bin/busybox", busybox, 0o755)
    tree.file("/init", GUEST / "initramfs-init", 0o755)
    for folder in ("/dev", "/proc", "/sys", "/root", "/modules/first", "/modules/other"):
        tree.folder(folder)
    chosen = ModuleSet(modules)
    for stage, names in (("first", FIRST), ("other", OTHER)):
        before = len(chosen.contents)
        for name in names:
            await chosen.add(name)
        for number, name in enumerate(list(chosen.contents)[before:]):
            tree.file(f"/modules/{stage}/{number:02}-{name}.ko", chosen.contents[name])
    return await asyncio.to_thread(tree.cpio)
