"""Read a qcow2 header: what it refers to, how big it claims to be, whether its tables can be true.

Layout and bit numbers: QEMU's docs/interop/qcow2.txt.
"""

import sys
from array import array

from atoll.images.source import DAMAGED, SourceFile

MAGIC = b"QFI\xfb"
DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2
EXTENSION_END, EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE = 0, 0xE2792ACA, 0x44415441
EXTENSION_ENCRYPTION = 0x0537BE77
V2_HEADER, V3_HEADER = 72, 104
# QEMU's own limits (block/qcow2.h): a bigger table is refused there too, only later and less clearly.
MAX_L1, MAX_REFCOUNT_TABLE = 32 << 20, 8 << 20
OFFSET_BITS = 0x00FF_FFFF_FFFF_FE00
MAX_SNAPSHOTS, SNAPSHOT_ENTRY = 65536, 40
SELF_CONTAINED = "Make it self-contained first: `qemu-img convert -O qcow2 OLD NEW`, where all its files are."


def virtual_size(source: SourceFile, *, layered: bool = False) -> int:
    """Bytes of the disk in a self-contained qcow2 file. Raises `ImageRefused` for any other.

    One that is `layered` may name a backing file: it lies on another layer, and what it says of that isn't looked at.
    """
    if source.peek(0, 4) != MAGIC:
        raise source.refused("it doesn't begin as a qcow2 file does", "Leave --format away to let Atoll find out.")
    version, backing_offset, backing_length, cluster_bits, size, encryption = source.unpack(">IQIIQI", 4)
    if version not in (2, 3):
        raise source.refused(f"qcow version {version} is not supported", SELF_CONTAINED)
    if not layered and (backing_offset or backing_length):
        backing = source.peek(backing_offset, min(backing_length, 1023)).decode(errors="backslashreplace")
        raise source.refused(f"it needs another file, {backing!r}, as its backing file", SELF_CONTAINED)
    if encryption:
        raise source.refused("it is encrypted", "Decrypt it first with `qemu-img convert`.")
    if not 9 <= cluster_bits <= 21:
        raise source.refused(f"its cluster size of 2^{cluster_bits} bytes can't be", DAMAGED)
    if version == 3:
        _check_features(source)
    _check_extensions(source, header_length=_header_length(source, version), end=1 << cluster_bits)
    _check_tables(source, size=size, cluster_bits=cluster_bits)
    return int(size)


def has_data(source: SourceFile) -> bool:
    """Whether a layer has anything of its own: without, what is below it shows through everywhere."""
    l1_entries, l1_offset = source.unpack(">IQ", 36)
    return _used_entries(source.read(l1_offset, l1_entries * 8)) > 0


def _check_features(source: SourceFile) -> None:
    (incompatible,) = source.unpack(">Q", 72)
    if incompatible & EXTERNAL_DATA:
        raise source.refused("it keeps its data in another file", SELF_CONTAINED)
    if incompatible & CORRUPT:
        raise source.refused("it is marked as corrupt", "Repair a copy of it: `qemu-img check -r all FILE`.")
    if unknown := incompatible & ~KNOWN_INCOMPATIBLE:
        raise source.refused(f"it uses features that are not known (bits {unknown:#x})", SELF_CONTAINED)


def _header_length(source: SourceFile, version: int) -> int:
    if version == 2:
        return V2_HEADER
    refcount_order, length = source.unpack(">II", 96)
    if refcount_order > 6 or length < V3_HEADER or length % 8:
        raise source.refused("its header has impossible values", DAMAGED)
    return int(length)


def _check_extensions(source: SourceFile, *, header_length: int, end: int) -> None:
    """Walk the header extensions, which lie in the first cluster."""
    offset = header_length
    while offset + 8 <= end:
        kind, length = source.unpack(">II", offset)
        if kind == EXTENSION_END:
            return
        if offset + 8 + length > end:
            raise source.refused("a header extension is longer than the header", DAMAGED)
        if kind == EXTENSION_DATA_FILE:
            raise source.refused("it keeps its data in another file", SELF_CONTAINED)
        if kind == EXTENSION_ENCRYPTION:
            raise source.refused("it is encrypted", "Decrypt it first with `qemu-img convert`.")
        offset += 8 + (length + 7) // 8 * 8


def _check_tables(source: SourceFile, *, size: int, cluster_bits: int) -> None:
    l1_entries, l1_offset, refcount_offset, refcount_clusters, snapshots, snapshots_offset = source.unpack(
        ">IQQIIQ", 36
    )
    cluster = 1 << cluster_bits
    entry = 16 if _has_extended_l2(source) else 8
    covered_by_l1_entry = cluster // entry * cluster
    if l1_entries * 8 > MAX_L1 or l1_entries * covered_by_l1_entry < size:
        raise source.refused("its L1 table doesn't fit the size of its disk", DAMAGED)
    if refcount_clusters * cluster > MAX_REFCOUNT_TABLE:
        raise source.refused("its refcount table is too big", DAMAGED)
    if snapshots > MAX_SNAPSHOTS:
        raise source.refused(f"it claims to have {snapshots} snapshots", DAMAGED)
    source.check_table("L1 table", offset=l1_offset, length=l1_entries * 8)
    source.check_table("refcount table", offset=refcount_offset, length=refcount_clusters * cluster)
    source.check_table("snapshot table", offset=snapshots_offset, length=snapshots * SNAPSHOT_ENTRY)
    # Each L2 table fills a cluster. When many entries share one, a few kilobytes describe terabytes.
    if _used_entries(source.read(l1_offset, l1_entries * 8)) * cluster > source.size:
        raise source.refused("its L1 table has more entries than the file has room for", DAMAGED)


def _used_entries(table: bytes) -> int:
    entries = array("Q", table)
    if sys.byteorder == "little":
        entries.byteswap()
    return sum(1 for entry in entries if entry & OFFSET_BITS)


def _has_extended_l2(source: SourceFile) -> bool:
    version, incompatible = source.unpack(">I", 4)[0], 0
    if version == 3:
        (incompatible,) = source.unpack(">Q", 72)
    return bool(incompatible & EXTENDED_L2)
