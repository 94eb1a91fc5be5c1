"""What differs on a disk, read block by block where both sides may have other content.

Layers below the ones that both sides have are never looked at. File systems (ext2, ext3, ext4; on the whole disk or in
a partition) that both have are compared by their files, so that of a disk with a table little is read but inodes and
folders. What is left is compared by its blocks, in the ranges that the layers above the common ones have written.
"""

from collections.abc import Callable, Iterable, Sequence

from atoll.host.block_reader import BlockReader
from atoll.host.ext_files import ExtFiles
from atoll.host.partitions import partitions
from atoll.model.difference import BlockDifference, DiskDifference, FileSystemDifference
from atoll.operations.diff_files import changed_files

Range = tuple[int, int]
"""Offset and length in bytes."""
BLOCK = 4096
_AT_ONCE = 1 << 20


def compare(
    name: str,
    old: BlockReader,
    new: BlockReader,
    ranges: Sequence[Range],
    *,
    related: bool,
    report: Callable[[int, int], None],
) -> DiskDifference | None:
    """What differs; None when nothing does. `ranges` are where it may; `related` disks have a layer in common.

    For a thread. Raises `OSError` when a disk can't be read.
    """
    systems: list[FileSystemDifference] = []
    covered: list[Range] = []
    reasons: list[str] = []
    for number, at_old, at_new in _places(old, new):
        try:
            before, after = ExtFiles(old.read, at_old), ExtFiles(new.read, at_new)
            files = changed_files(before, after, contents=related)
        except ValueError as error:
            reasons.append(f"partition {number}: {error}" if number else str(error))
            continue
        covered += [(at_old, before.length), (at_new, after.length)]
        if files:
            systems.append(FileSystemDifference(partition=number, kind=after.kind, files=tuple(files)))
    left = without(merged(ranges), merged(covered))
    count, size = _differing_blocks(old, new, left, report)
    blocks = None
    if count:
        why = "; ".join(reasons) if reasons else "outside of file systems"
        blocks = BlockDifference(ranges=count, bytes=size, why=why)
    return DiskDifference(name=name, file_systems=tuple(systems), blocks=blocks) if systems or blocks else None


def _places(old: BlockReader, new: BlockReader) -> list[tuple[int | None, int, int]]:
    """Where file systems may be on both: the partition's number, and its offset on either side."""
    before, after = partitions(old.read), partitions(new.read)
    if not before and not after:
        return [(None, 0, 0)]
    return [(number, before[number][0], after[number][0]) for number in sorted(before.keys() & after.keys())]


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same places in order, without overlaps."""
    found: list[Range] = []
    for start, length in sorted(ranges):
        if found and start <= sum(found[-1]):
            end = max(sum(found[-1]), start + length)
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, length))
    return found


def without(ranges: Sequence[Range], holes: Sequence[Range]) -> list[Range]:
    """What of the ranges is in no hole. Both are in order and don't overlap."""
    found: list[Range] = []
    first = 0
    for start, length in ranges:
        end = start + length
        while first < len(holes) and sum(holes[first]) <= start:
            first += 1
        at = first
        while at < len(holes) and holes[at][0] < end:
            if holes[at][0] > start:
                found.append((start, holes[at][0] - start))
            start = max(start, sum(holes[at]))
            at += 1
        if start < end:
            found.append((start, end - start))
    return found


def _differing_blocks(
    old: BlockReader, new: BlockReader, ranges: Sequence[Range], report: Callable[[int, int], None]
) -> tuple[int, int]:
    """How many runs of blocks differ, and how many bytes they have together."""
    total, done = sum(length for _, length in ranges), 0
    count = size = 0
    ended = -1
    for start, length in ranges:
        for offset in range(start, start + length, _AT_ONCE):
            piece = min(_AT_ONCE, start + length - offset)
            one, other = _read(old, offset, piece), _read(new, offset, piece)
            for at in range(0, piece, BLOCK) if one != other else ():
                if one[at : at + BLOCK] != other[at : at + BLOCK]:
                    count += offset + at != ended
                    size += min(BLOCK, piece - at)
                    ended = offset + at + min(BLOCK, piece - at)
            done += piece
            report(done, total)
    return count, size


def _read(disk: BlockReader, offset: int, length: int) -> bytes:
    """Beyond the end of the smaller disk there are zeros."""
    there = max(0, min(length, disk.size - offset))
    return (disk.read_anew(offset, there) if there else b"") + bytes(length - there)
