"""Where the partitions of a disk are: GPT, or the four primary ones of an MBR."""

import struct
from collections.abc import Callable

Read = Callable[[int, int], bytes]
"""Bytes of a disk: offset and length. Raises `ValueError` beyond its end."""
SECTOR = 512
_MOST = 1024


def partitions(read: Read) -> dict[int, tuple[int, int]]:
    """Number, and offset and length in bytes; empty for a disk without a table."""
    try:
        first = read(0, SECTOR)
        if first[510:512] != b"\x55\xaa":
            return {}
        header = read(SECTOR, SECTOR)
        return _gpt(read, header) if header[:8] == b"EFI PART" else _mbr(first)
    except ValueError:
        return {}


def _gpt(read: Read, header: bytes) -> dict[int, tuple[int, int]]:
    start, count, size = struct.unpack_from("<QII", header, 72)
    if size < 128 or count > _MOST:
        return {}
    table = read(start * SECTOR, count * size)
    found = {}
    for number in range(count):
        kind = table[number * size :][:16]
        first, last = struct.unpack_from("<QQ", table, number * size + 32)
        if any(kind) and first <= last:
            found[number + 1] = (first * SECTOR, (last - first + 1) * SECTOR)
    return found


def _mbr(first: bytes) -> dict[int, tuple[int, int]]:
    found = {}
    for number in range(4):
        kind, start, count = struct.unpack_from("<4xB3xII", first, 446 + number * 16)
        if kind and count:
            found[number + 1] = (start * SECTOR, count * SECTOR)
    return found
