"""The file format of QEMU's `mapped-ram` streams, where each page of RAM has a place of its own.

As in `migration/ram.c` and `docs/devel/migration/mapped-ram.rst` of QEMU's source: after the stream's header there is
for each block of RAM a record (name, length, offsets), its bitmap of the pages that were written, and its pages; after
the last block comes the state of the devices. Numbers are big-endian, bitmaps the host's own words.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from atoll.errors import EngineFailed

RAM = "ram"
"""The name of the block that the guest's memory is; others are ROMs and video memory."""
_RECORD = struct.Struct(">QIQQQ")
_SECTION = b"\x03ram\0\0\0\0\0\0\0\x04"
_FLAGS = 0x1FF
_LARGEST_HEADER = 1 << 16
_CHUNK = 1 << 20


class Block(Struct, frozen=True, kw_only=True):
    """One block of RAM in the file. All in bytes."""

    name: str
    length: int
    page_size: int
    bitmap_offset: int
    pages_offset: int

    @property
    def end(self) -> int:
        return self.pages_offset + self.length

    @property
    def bitmap_length(self) -> int:
        return -(-(self.length // self.page_size) // 64) * 8


def blocks(descriptor: int) -> list[Block]:
    """The blocks of a stream. Raises `EngineFailed` for a file that is none."""
    position, left = _beginning(descriptor)
    found = []
    while left > 0:
        block = _block(descriptor, position)
        found.append(block)
        position = block.end
        left -= block.length
    return found


def _beginning(descriptor: int) -> tuple[int, int]:
    """Where the first block is, and the bytes of RAM in all blocks. Raises `EngineFailed`."""
    head = os.pread(descriptor, _LARGEST_HEADER, 0)
    start = head.find(_SECTION)
    if not head.startswith(b"QEVM\0\0\0\x03") or start < 0:
        raise EngineFailed("the memory can't be read", "it is no mapped-ram stream of QEMU's")
    position = start + len(_SECTION)
    return position + 8, int.from_bytes(head[position : position + 8], "big") & ~_FLAGS


def is_mapped(path: Path) -> bool:
    """Whether it is such a stream, or a plain one, as QEMU before 9.0 writes it. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return has_blocks(descriptor)
    finally:
        os.close(descriptor)


def has_blocks(descriptor: int) -> bool:
    """The same for an open file, which may be cut."""
    try:
        position, left = _beginning(descriptor)
        return left > 0 and bool(_block(descriptor, position))
    except EngineFailed:
        return False


def _block(descriptor: int, position: int) -> Block:
    record = os.pread(descriptor, 256 + _RECORD.size, position)
    size = record[0] if record else 0
    try:
        name = record[1 : 1 + size].decode()
        length, version, page_size, bitmap_offset, pages_offset = _RECORD.unpack_from(record, 1 + size)
    except (struct.error, UnicodeDecodeError) as error:
        raise EngineFailed("the memory can't be read", f"its record at {position} is damaged") from error
    if version != 1 or not name or not 512 <= page_size <= 1 << 30 or not position < bitmap_offset < pages_offset:
        raise EngineFailed("the memory can't be read", f"its record at {position} is damaged")
    return Block(name=name, length=length, page_size=page_size, bitmap_offset=bitmap_offset, pages_offset=pages_offset)


def write_bitmaps(path: Path) -> None:
    """Say which pages are there, if QEMU hasn't.

    QEMU up to 10.0 at least doesn't write the bitmaps of a background snapshot, so that its own loader would skip every
    page. A page that isn't zero is one that has data in the sparse file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for block in blocks(descriptor):
            if not any(os.pread(descriptor, block.bitmap_length, block.bitmap_offset)):
                os.pwrite(descriptor, _bitmap(descriptor, block), block.bitmap_offset)
    finally:
        os.close(descriptor)


def _bitmap(descriptor: int, block: Block) -> bytes:
    bits = bytearray(block.bitmap_length)
    for start, end in data(descriptor, block.pages_offset, block.end):
        first = (start - block.pages_offset) // block.page_size
        last = -(-(end - block.pages_offset) // block.page_size)
        _set_bits(bits, first, last)
    return bytes(bits)


def _set_bits(bits: bytearray, first: int, last: int) -> None:
    """Set bits `first` up to, without, `last`; the lowest bit of a byte is its first page."""
    while first < last and first % 8:
        bits[first // 8] |= 1 << first % 8
        first += 1
    whole = (last - first) // 8
    if whole > 0:
        bits[first // 8 : first // 8 + whole] = b"\xff" * whole
        first += whole * 8
    while first < last:
        bits[first // 8] |= 1 << first % 8
        first += 1


def data(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a sparse file that aren't holes, within the range."""
    while start < end:
        try:
            first = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError:
            return
        if first >= end:
            return
        start = min(os.lseek(descriptor, first, os.SEEK_HOLE), end)
        yield first, start


def ram_of(found: Sequence[Block]) -> Block:
    """The block that is the guest's memory. Raises `EngineFailed` when there is none."""
    for block in found:
        if block.name == RAM:
            return block
    raise EngineFailed("the memory can't be read", f"it has no block '{RAM}'")


def first_word(path: Path) -> tuple[int, int] | None:
    """The offset in RAM and the value of a word that isn't zero, to see whether it is there; None if all is zero.

    It is looked for above the first MiB, where PCs have ROMs and video memory in RAM's place, and in the first GiB.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ram = ram_of(blocks(descriptor))
        for start, end in data(descriptor, ram.pages_offset + (1 << 20), min(ram.end, ram.pages_offset + (1 << 30))):
            page = os.pread(descriptor, min(ram.page_size, end - start), start)
            for position in range(0, len(page) - 7, 8):
                word = int.from_bytes(page[position : position + 8], "little")
                if word:
                    return start - ram.pages_offset + position, word
        return None
    finally:
        os.close(descriptor)


def without_ram(source: Path, target: Path) -> None:
    """Copy a stream but for the guest's memory.

    In the copy no page of that block is marked as there, so a machine whose RAM is mapped from `source` keeps it.
    """
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ram = ram_of(blocks(reading))
        size = os.fstat(reading).st_size
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(writing, size)
            for start, end in ((0, ram.bitmap_offset), (ram.end, size)):
                _copy(reading, writing, start, end)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copy(reading: int, writing: int, start: int, end: int) -> None:
    for first, last in data(reading, start, end):
        while first < last:
            first += os.pwrite(writing, os.pread(reading, min(_CHUNK, last - first), first), first)
