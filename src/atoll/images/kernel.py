"""Kernels as QEMU starts them quickest: decompressed on the host instead of by the guest under emulation."""

import lzma
import struct
import zlib

from atoll.errors import ImageRefused, ProcessFailed
from atoll.host import process

# The compressed payload's first bytes, as the kernel's own scripts know them (scripts/extract-vmlinux).
_GZIP, _XZ, _LZMA, _ZSTD = b"\x1f\x8b\x08", b"\xfd7zXZ\x00", b"\x5d\x00\x00", b"\x28\xb5\x2f\xfd"
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
# Note type of the PVH entry point in an x86 kernel's ELF notes (xen/interface/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY).
_PVH_NOTE_TYPE = 18
_PT_NOTE = 4


async def decompressed(kernel: bytes) -> bytes:
    """The kernel in the form that QEMU's `-kernel` starts without a decompressor running in the guest.

    x86: the `vmlinux` ELF inside a bzImage, or the bzImage itself where that ELF has no PVH entry; arm64 and riscv64:
    the plain `Image`. What isn't compressed is given back as it is. Raises `ImageRefused`, `MissingTool`.
    """
    if _is_bzimage(kernel):
        vmlinux = await _payload_of_bzimage(kernel)
        return vmlinux if has_pvh_entry(vmlinux) else kernel
    if kernel[:2] == b"MZ" and kernel[4:8] == b"zimg":
        # An EFI zboot image: the payload's place and length follow the magic (include/linux/pe.h of the kernel).
        offset, length = struct.unpack_from("<II", kernel, 8)
        return await _decompress(kernel[offset : offset + length])
    if kernel.startswith(_GZIP):
        return await _decompress(kernel)
    return kernel


def _is_bzimage(kernel: bytes) -> bool:
    return len(kernel) > 0x260 and kernel[0x202:0x206] == b"HdrS"


async def _payload_of_bzimage(kernel: bytes) -> bytes:
    # Fields of the setup header (Documentation/arch/x86/boot.rst): protocol version at 0x206, number of setup sectors
    # at 0x1f1 (0 means 4), place and length of the payload at 0x248 and 0x24c, from protocol 2.08 on.
    (version,) = struct.unpack_from("<H", kernel, 0x206)
    if version < 0x0208:
        raise ImageRefused(
            "the kernel is too old", f"its boot protocol is {version >> 8}.{version & 0xFF:02}, not 2.08"
        )
    sectors = kernel[0x1F1] or 4
    offset, length = struct.unpack_from("<II", kernel, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = kernel[start : start + length]
    if not length or len(payload) < length:
        raise ImageRefused("the kernel is damaged", "its payload goes beyond the end of the file")
    return await _decompress(payload)


async def _decompress(payload: bytes) -> bytes:
    try:
        if payload.startswith(_GZIP):
            return zlib.decompressobj(wbits=31).decompress(payload)
        if payload.startswith(_XZ):
            return lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(payload)
        if payload.startswith(_LZMA):
            return lzma.LZMADecompressor(format=lzma.FORMAT_ALONE).decompress(payload)
        if payload.startswith(_ZSTD):
            return await _decompress_by("zstd", payload)
        if payload.startswith(_LZ4_LEGACY):
            return await _decompress_by("lz4", payload)
    except (zlib.error, lzma.LZMAError, EOFError, ProcessFailed) as error:
        raise ImageRefused("the kernel can't be decompressed", str(error)) from error
    raise ImageRefused("the kernel can't be decompressed", f"its compression is unknown ({payload[:6].hex()})")


async def _decompress_by(program: str, payload: bytes) -> bytes:
    # The kernel's build appends the length in four bytes in most places, which these programs take for an error.
    finished = await process.run([program, "-dcq"], stdin=payload[:-4], check=False)
    if finished.exit_code != 0:
        finished = await process.run([program, "-dcq"], stdin=payload)
    return finished.stdout


def has_pvh_entry(vmlinux: bytes) -> bool:
    """Whether the ELF tells its PVH entry in a note, without which QEMU refuses to start it."""
    try:
        return vmlinux[:5] == b"\x7fELF\x02" and _PVH_NOTE_TYPE in _note_types(_notes_of(vmlinux))
    except struct.error:
        return False


def _notes_of(vmlinux: bytes) -> bytes:
    """The contents of the ELF's note segments (elf(5): e_phoff, e_phentsize, e_phnum, then the program headers)."""
    notes = b""
    (table,) = struct.unpack_from("<Q", vmlinux, 0x20)
    entry_size, count = struct.unpack_from("<HH", vmlinux, 0x36)
    for index in range(count):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", vmlinux, table + index * entry_size)
        if kind == _PT_NOTE:
            notes += vmlinux[offset : offset + size]
    return notes


def _note_types(notes: bytes) -> list[int]:
    types, place = [], 0
    while place + 12 <= len(notes):
        name_size, description_size, kind = struct.unpack_from("<III", notes, place)
        types.append(kind)
        place += 12 + (name_size + 3 & ~3) + (description_size + 3 & ~3)
    return types
