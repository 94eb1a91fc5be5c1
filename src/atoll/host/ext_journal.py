"""What the journal of an ext3 or ext4 file system holds that the file system doesn't yet.

Nothing is written: the answer tells which block of the journal stands for which block of the file system. The layout is
that of Documentation/filesystems/ext4/journal.rst in Linux.
"""

import struct
from collections.abc import Callable, Sequence

Replayed = dict[int, tuple[int, bytes]]
"""A block's number, where its content is, and the bytes that stand in place of the first ones there."""

_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _REVOCATION = 1, 2, 5
_64BIT, _CHECKSUM_2, _CHECKSUM_3, _FAST_COMMIT = 0x2, 0x8, 0x10, 0x20
_KNOWN = 0x3F
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8


class _Log:
    """The journal as a ring of blocks."""

    def __init__(self, blocks: Sequence[int | None], read: Callable[[int], bytes]) -> None:
        self._blocks, self._read = blocks, read
        self._end: int
        self._first: int
        head = self.read(0)
        magic, kind, _, size, self._end, self._first, self.sequence, self.start = struct.unpack_from(">8I", head)
        if magic != _MAGIC or kind not in (3, 4) or size != len(head):
            raise ValueError("the journal of its file system is damaged")
        self.features = struct.unpack_from(">I", head, 40)[0] if kind == 4 else 0
        if self.features & ~_KNOWN:
            raise ValueError(f"its journal has features that aren't known ({self.features & ~_KNOWN:#x})")
        if self.features & _FAST_COMMIT:
            self._end -= struct.unpack_from(">I", head, 0x54)[0] or 256
        if not 0 < self._first < self._end <= len(blocks):
            raise ValueError("the journal of its file system is damaged")

    def place(self, position: int) -> int:
        """The block of the file system that a position in the log is."""
        found = self._blocks[position]
        if found is None:
            raise ValueError("the journal of its file system is damaged")
        return found

    def read(self, position: int) -> bytes:
        return self._read(self.place(position))

    def after(self, position: int, steps: int = 1) -> int:
        return self._first + (position - self._first + steps) % (self._end - self._first)

    @property
    def length(self) -> int:
        return self._end - self._first


def replay(blocks: Sequence[int | None], read: Callable[[int], bytes]) -> Replayed:
    """What whole transactions in the journal have; `blocks` are the journal's own. Raises `ValueError`.

    Fast commits, small additions after the last transaction, are left out.
    """
    log = _Log(blocks, read)
    found: dict[int, tuple[int, int, bytes]] = {}
    revoked: dict[int, int] = {}
    position, sequence, steps = log.start, log.sequence, 0
    writes: list[tuple[int, int, bytes]] = []
    withdrawn: list[int] = []
    while position and steps < log.length:
        block = log.read(position)
        magic, kind, of = struct.unpack_from(">3I", block)
        if magic != _MAGIC or of != sequence:
            break
        taken = 1
        if kind == _DESCRIPTOR:
            tags = list(_tags(block, log.features))
            for number, (target, escaped) in enumerate(tags, start=1):
                start = struct.pack(">I", _MAGIC) if escaped else b""
                writes.append((target, log.place(log.after(position, number)), start))
            taken += len(tags)
        elif kind == _REVOCATION:
            withdrawn += _revocations(block, log.features)
        elif kind == _COMMIT:
            found |= {target: (sequence, place, start) for target, place, start in writes}
            revoked |= dict.fromkeys(withdrawn, sequence)
            writes, withdrawn, sequence = [], [], (sequence + 1) % (1 << 32)
        else:
            break
        position, steps = log.after(position, taken), steps + taken
    # A block that was given up, and may be part of a file since, isn't what it was before that.
    return {
        target: (place, start)
        for target, (of, place, start) in found.items()
        if target not in revoked or revoked[target] < of
    }


def _tags(block: bytes, features: int) -> list[tuple[int, bool]]:
    """The blocks whose contents come after a descriptor, and whether each had to be escaped."""
    checked = features & (_CHECKSUM_2 | _CHECKSUM_3)
    end = len(block) - (4 if checked else 0)
    found: list[tuple[int, bool]] = []
    at = 12
    if features & _CHECKSUM_3:
        size = 16
    else:
        size = (12 if features & _64BIT else 8) + (2 if features & _CHECKSUM_2 else 0)
    while at + size <= end:
        if features & _CHECKSUM_3:
            low, flags, high = struct.unpack_from(">III", block, at)
        else:
            low, flags = struct.unpack_from(">I2xH", block, at)
            high = struct.unpack_from(">I", block, at + 8)[0] if features & _64BIT else 0
        found.append((low | (high << 32 if features & _64BIT else 0), bool(flags & _ESCAPED)))
        if flags & _LAST:
            break
        at += size + (0 if flags & _SAME_UUID else 16)
    return found


def _revocations(block: bytes, features: int) -> list[int]:
    (used,) = struct.unpack_from(">I", block, 12)
    size, letter = (8, "Q") if features & _64BIT else (4, "I")
    count = (min(used, len(block)) - 16) // size
    return list(struct.unpack_from(f">{max(count, 0)}{letter}", block, 16))
