"""Recognise files that are used as they are: CD images, floppies, kernels and raw disks.

None of these can refer to another file, so all that is checked is what they are and whether they are whole.
"""

import struct

from atoll.images.source import DAMAGED, SourceFile
from atoll.model.spec import Arch

SECTOR = 512
BOOT_SIGNATURE = b"\x55\xaa"
ISO_DESCRIPTOR, ISO_SECTOR, ISO_PRIMARY = 16 * 2048, 2048, 1
ISO_MAGICS = (b"CD001", b"BEA01")
"""ISO 9660, and the start of a UDF volume (ECMA-167)."""
# 160 KiB of 1981 to the 2.88 MiB disk, with Microsoft's 1.68 MiB distribution format.
FLOPPY_SIZES = frozenset(kib * 1024 for kib in (160, 180, 320, 360, 720, 1200, 1440, 1680, 2880))
# ext2-4, XFS, Btrfs, UFS2, LVM, swap: offset and magic, as `file` and blkid know them.
FILE_SYSTEMS = (
    (1080, b"\x53\xef"),
    (0, b"XFSB"),
    (0x10040, b"_BHRfS_M"),
    (0x1055C, b"\x19\x01\x54\x19"),
    (512, b"LABELONE"),
    (4086, b"SWAPSPACE2"),
)
GPT_MAGIC = b"EFI PART"
# ELF e_machine, and Machine of a PE file's COFF header.
ELF_MACHINES: dict[int, Arch] = {62: "x86_64", 183: "aarch64", 243: "riscv64"}
PE_MACHINES: dict[int, Arch] = {0x8664: "x86_64", 0xAA64: "aarch64", 0x5064: "riscv64"}
ELF_EXECUTABLE, ELF_SHARED, ELF_INTERPRETER = 2, 3, 3
MAX_KERNEL = 1 << 30
"""No kernel is near a GiB; one that size wouldn't fit in the guest's memory."""


def is_iso(source: SourceFile) -> bool:
    """Whether there is a volume descriptor of ISO 9660 or UDF; hybrid images with a partition table count."""
    return source.peek(ISO_DESCRIPTOR + 1, 5) in ISO_MAGICS


def iso_size(source: SourceFile) -> int:
    """Bytes of the disc. Raises `ImageRefused` when it isn't a CD image or its end is missing."""
    if not is_iso(source):
        raise source.refused("it has no ISO 9660 or UDF volume", "Leave --format away to let Atoll find out.")
    descriptor = source.peek(ISO_DESCRIPTOR, ISO_SECTOR)
    if descriptor[:6] == bytes([ISO_PRIMARY]) + ISO_MAGICS[0] and len(descriptor) == ISO_SECTOR:
        # Volume space size and logical block size, little-endian halves (ECMA-119, 8.4.8 and 8.4.12).
        blocks, block = struct.unpack_from("<I", descriptor, 80)[0], struct.unpack_from("<H", descriptor, 128)[0]
        if blocks * block > source.size:
            raise source.refused(f"its end is missing ({source.size} of {blocks * block} bytes)", DAMAGED)
    return source.size


def is_floppy(source: SourceFile) -> bool:
    """Whether it has a floppy disk's size and a boot sector: the signature, or the jump and sizes of a FAT."""
    if source.size not in FLOPPY_SIZES:
        return False
    sector = source.peek(0, SECTOR)
    return sector[510:] == BOOT_SIGNATURE or (sector[:1] in (b"\xeb", b"\xe9") and sector[11:13] == b"\x00\x02")


def floppy_size(source: SourceFile) -> int:
    """Bytes of the disk. Raises `ImageRefused` when no floppy drive has that size."""
    if source.size not in FLOPPY_SIZES:
        raise source.refused(f"no floppy disk has {source.size} bytes", "A 1.44 MB disk has 1474560.")
    return source.size


def is_raw(source: SourceFile) -> bool:
    """Whether a disk shows in the plain bytes: a boot sector or partition table, or a file system without one."""
    start = source.peek(0, SECTOR)
    if len(start) == SECTOR and start[510:] == BOOT_SIGNATURE:
        return True
    if any(source.peek(offset, len(GPT_MAGIC)) == GPT_MAGIC for offset in (512, 4096)):
        return True
    return any(source.peek(offset, len(magic)) == magic for offset, magic in FILE_SYSTEMS)


def kernel_arch(source: SourceFile) -> Arch | None:
    """The machine that a Linux (or other ELF) kernel is for; None when it isn't recognised as a kernel."""
    start = source.peek(0, 0x240).ljust(0x240, b"\0")
    if start[0x202:0x206] == b"HdrS" and start[510:512] == BOOT_SIGNATURE:
        # The x86 boot protocol; a 32-bit kernel runs on x86-64 as well.
        return "x86_64"
    if start[56:60] == b"ARM\x64":
        return "aarch64"
    if start[56:60] == b"RSC\x05":
        return "riscv64"
    if start[:2] == b"MZ" and start[4:8] == b"zimg":
        return _pe_arch(source, start)
    if start[:4] == b"\x7fELF":
        return _elf_arch(source, start)
    return None


def kernel_size(source: SourceFile) -> int:
    """Bytes of a kernel or initial RAM disk. Raises `ImageRefused` when it is absurdly big."""
    if source.size > MAX_KERNEL:
        raise source.refused(f"a kernel or initrd has no {source.size} bytes", "Is it a disk? Then say --format raw.")
    return source.size


def _pe_arch(source: SourceFile, start: bytes) -> Arch | None:
    (header,) = struct.unpack_from("<I", start, 0x3C)
    found = source.peek(header, 6)
    return PE_MACHINES.get(int.from_bytes(found[4:6], "little")) if found[:4] == b"PE\0\0" else None


def _elf_arch(source: SourceFile, start: bytes) -> Arch | None:
    """The machine of a 64-bit ELF that asks for no dynamic loader, as programs do."""
    if start[4:6] != b"\x02\x01":
        return None
    kind, machine = struct.unpack_from("<HH", start, 16)
    (headers,) = struct.unpack_from("<Q", start, 32)
    entry_size, count = struct.unpack_from("<HH", start, 54)
    if kind not in (ELF_EXECUTABLE, ELF_SHARED) or entry_size != 56 or headers > source.size:
        return None
    table = source.peek(headers, entry_size * min(count, 64))
    types = [int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table), entry_size)]
    return None if ELF_INTERPRETER in types else ELF_MACHINES.get(machine)
