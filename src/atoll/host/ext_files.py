"""Reads the files of an ext2, ext3 or ext4 file system: without root, and without mounting it.

Not by debugfs: that wants a raw copy of the whole disk, takes a command for each folder, and prints for people. The
layout is that of Documentation/filesystems/ext4 in Linux. What the journal holds and the file system doesn't yet is
read from the journal, as a mount would have it. A file system with a feature that isn't known is refused, and one that
is damaged, or being written, ends in `ValueError` and never in an endless loop.
"""

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from atoll.host.ext_journal import Replayed, replay
from atoll.host.partitions import Read

ROOT = 2
_MAGIC = 0xEF53
_INCOMPAT_FILETYPE, _INCOMPAT_RECOVER, _INCOMPAT_EXTENTS, _INCOMPAT_64BIT = 0x2, 0x4, 0x40, 0x80
# And multiple mount protection, flexible groups, big attributes, a checksum seed, large folders, folded case.
_KNOWN = _INCOMPAT_FILETYPE | _INCOMPAT_RECOVER | _INCOMPAT_EXTENTS | _INCOMPAT_64BIT | 0x26700
_COMPAT_JOURNAL = 0x4
_FLAG_ENCRYPTED, _FLAG_EXTENTS, _FLAG_INLINE = 0x800, 0x80000, 0x10000000
_EXTENT_MAGIC, _LONGEST_WRITTEN, _DEEPEST = 0xF30A, 32768, 5
_DIRECT = 12
_LONGEST_JOURNAL = 1 << 22
_LARGEST_TARGET = 4096


@dataclass(frozen=True, slots=True)
class Inode:
    """A file, but for its names."""

    number: int
    mode: int
    owner: tuple[int, int]
    size: int
    modified: int
    """Nanoseconds since 1970."""
    changed: int
    flags: int
    block: bytes
    """Where its content is; of a short symbolic link, and of a device, that itself."""

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


class ExtFiles:
    """An open file system, `length` bytes from `offset` on. Raises `ValueError` where there is none that is known."""

    def __init__(self, read: Read, offset: int = 0) -> None:
        self._read, self._offset = read, offset
        head = read(offset + 1024, 1024)
        if struct.unpack_from("<H", head, 56)[0] != _MAGIC:
            raise ValueError("no ext2, ext3 or ext4 file system is there")
        self._first_block, log_size = struct.unpack_from("<II", head, 20)
        (self._inodes_of_group,) = struct.unpack_from("<I", head, 40)
        self.blocks: int
        self._inodes, self.blocks = struct.unpack_from("<II", head, 0)
        (self._inode_size,) = struct.unpack_from("<H", head, 88)
        compat, self._incompat = struct.unpack_from("<II", head, 92)
        (size_of_descriptor,) = struct.unpack_from("<H", head, 254)
        if self._incompat & ~_KNOWN:
            raise ValueError(f"its file system has features that aren't known ({self._incompat & ~_KNOWN:#x})")
        self._wide = bool(self._incompat & _INCOMPAT_64BIT)
        if self._wide:
            self.blocks += struct.unpack_from("<I", head, 0x150)[0] << 32
        self._descriptor_size = size_of_descriptor if self._wide else 32
        if struct.unpack_from("<I", head, 76)[0] == 0:
            self._inode_size = 128
        # Blocks of 1 to 64 KiB, in which neither inodes nor descriptors cross a border.
        allowed = [1 << each for each in range(7, 11 + min(log_size, 6))]
        if log_size > 6 or self._inodes_of_group == 0 or self._inode_size not in allowed:
            raise ValueError("the head of its file system can't be true")
        if self._wide and size_of_descriptor not in (64, *allowed):
            raise ValueError("the head of its file system can't be true")
        self.block_size: int = 1024 << log_size
        self._has_journal = bool(compat & _COMPAT_JOURNAL)
        self._journal_inode = struct.unpack_from("<I", head, 224)[0]
        self._inode_tables: dict[int, int] = {}
        self._replayed: Replayed = {}
        if self._incompat & _INCOMPAT_RECOVER and self._has_journal:
            self._replayed = self._journal()
            self._inode_tables.clear()

    @property
    def kind(self) -> Literal["ext2", "ext3", "ext4"]:
        if self._incompat & (_INCOMPAT_EXTENTS | _INCOMPAT_64BIT):
            return "ext4"
        return "ext3" if self._has_journal else "ext2"

    @property
    def length(self) -> int:
        return self.blocks * self.block_size

    def _journal(self) -> Replayed:
        if self._journal_inode == 0:
            raise ValueError("the journal of its file system is on another disk")
        blocks = islice(self._physical_blocks(self.inode(self._journal_inode)), _LONGEST_JOURNAL)
        return replay(list(blocks), self._block_on_disk)

    def _block_on_disk(self, number: int) -> bytes:
        return self._read(self._offset + number * self.block_size, self.block_size)

    def _block(self, number: int) -> bytes:
        if number in self._replayed:
            place, start = self._replayed[number]
            return start + self._block_on_disk(place)[len(start) :]
        return self._block_on_disk(number)

    def _inode_table(self, group: int) -> int:
        if group not in self._inode_tables:
            at, within = divmod(group * self._descriptor_size, self.block_size)
            descriptor = self._block(self._first_block + 1 + at)
            (table,) = struct.unpack_from("<I", descriptor, within + 8)
            if self._wide:
                table += struct.unpack_from("<I", descriptor, within + 40)[0] << 32
            self._inode_tables[group] = table
        return self._inode_tables[group]

    def inode(self, number: int) -> Inode:
        if not 1 <= number <= self._inodes:
            raise ValueError(f"it names a file {number}, which can't be")
        group, index = divmod(number - 1, self._inodes_of_group)
        at, within = divmod(index * self._inode_size, self.block_size)
        block = self._block(self._inode_table(group) + at)
        mode, uid, size, changed, modified, gid = struct.unpack_from("<HHI4xII4xH", block, within)
        (flags,) = struct.unpack_from("<I", block, within + 32)
        (size_high,) = struct.unpack_from("<I", block, within + 108)
        uid_high, gid_high = struct.unpack_from("<HH", block, within + 120)
        changed_more = modified_more = 0
        if self._inode_size >= 140:
            extra, changed_more, modified_more = struct.unpack_from("<H2xII", block, within + 128)
            if extra < 12:
                changed_more = modified_more = 0
        return Inode(
            number=number,
            mode=mode,
            owner=(uid | uid_high << 16, gid | gid_high << 16),
            size=size | size_high << 32 if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else size,
            modified=_nanoseconds(modified, modified_more),
            changed=_nanoseconds(changed, changed_more),
            flags=flags,
            block=block[within + 40 : within + 100],
        )

    def folder(self, inode: Inode) -> dict[bytes, int]:
        """The names in a folder, with the numbers of their files; without `.` and `..`."""
        if inode.flags & _FLAG_ENCRYPTED:
            raise ValueError("it has folders that are encrypted")
        found: dict[bytes, int] = {}
        for _, number in zip(range(-(-inode.size // self.block_size)), self._physical_blocks(inode), strict=False):
            if number is not None:
                found |= self._names(self._block(number))
        return found

    def _names(self, block: bytes) -> dict[bytes, int]:
        found, at = {}, 0
        while at + 8 <= len(block):
            number, length, size, kind = struct.unpack_from("<IHBB", block, at)
            if not self._incompat & _INCOMPAT_FILETYPE:
                size |= kind << 8
            if length in (0, 65535) and len(block) == 65536:
                length = len(block) - at
            if length < 8 or at + length > len(block) or size > length - 8:
                raise ValueError("a folder of it is damaged, or just being written")
            name = block[at + 8 : at + 8 + size]
            # 0: a name that was taken away, a checksum, or the index of a large folder.
            if number and name not in (b".", b".."):
                found[name] = number
            at += length
        return found

    def target(self, inode: Inode) -> bytes:
        """Where a symbolic link leads to."""
        if inode.size < 60 and not inode.flags & _FLAG_EXTENTS:
            return inode.block[: inode.size]
        if inode.size > _LARGEST_TARGET:
            raise ValueError("a link of it is damaged")
        return b"".join(self.content(inode))[: inode.size]

    def content(self, inode: Inode) -> Iterator[bytes]:
        """A file's content, block by block; the last one may go beyond its end."""
        empty = bytes(self.block_size)
        left = -(-inode.size // self.block_size)
        for number in self._physical_blocks(inode):
            if left == 0:
                return
            yield empty if number is None else self._block(number)
            left -= 1
        for _ in range(left):
            yield empty

    def _physical_blocks(self, inode: Inode) -> Iterator[int | None]:
        """The numbers of the blocks of its content, in order; None for a hole and for what was never written."""
        if inode.flags & _FLAG_INLINE:
            raise ValueError("it has content that is kept in inodes")
        if inode.flags & _FLAG_EXTENTS:
            expected = 0
            for logical, physical, count, written in self._extents(inode.block, inode.block, _DEEPEST):
                if logical < expected or count == 0:
                    raise ValueError("a file of it is damaged, or just being written")
                yield from (None for _ in range(logical - expected))
                yield from (physical + each if written else None for each in range(count))
                expected = logical + count
            return
        pointers = struct.unpack("<15I", inode.block)
        yield from (number or None for number in pointers[:_DIRECT])
        for depth, number in enumerate(pointers[_DIRECT:], start=1):
            yield from self._indirect(number, depth)

    def _extents(self, node: bytes, root: bytes, depth_left: int) -> Iterator[tuple[int, int, int, bool]]:
        magic, entries, _, depth = struct.unpack_from("<HHHH", node)
        # Only an empty file has an empty node. So each step leads on, and there is an end.
        empty = entries == 0 and node is not root
        if magic != _EXTENT_MAGIC or depth > depth_left or 12 + entries * 12 > len(node) or empty:
            raise ValueError("a file of it is damaged, or just being written")
        for at in range(12, 12 + entries * 12, 12):
            if depth:
                _, low, high = struct.unpack_from("<IIH", node, at)
                yield from self._extents(self._block(low | high << 32), root, depth - 1)
                continue
            logical, count, high, low = struct.unpack_from("<IHHI", node, at)
            written = count <= _LONGEST_WRITTEN
            yield logical, low | high << 32, count if written else count - _LONGEST_WRITTEN, written

    def _indirect(self, number: int, depth: int) -> Iterator[int | None]:
        each = self.block_size // 4
        if number == 0:
            yield from (None for _ in range(each**depth))
            return
        for below in struct.unpack(f"<{each}I", self._block(number)):
            if depth > 1:
                yield from self._indirect(below, depth - 1)
            else:
                yield below or None


def _nanoseconds(seconds: int, more: int) -> int:
    """A time of an inode: signed seconds, and a word with 30 bits of nanoseconds and two more of the seconds."""
    signed = seconds - (1 << 32) if seconds >= 1 << 31 else seconds
    return (signed + ((more & 3) << 32)) * 1_000_000_000 + (more >> 2)
