"""Read the footer and headers of VHD (called `vpc` by QEMU) and VHDX files.

Layouts: Microsoft's "Virtual Hard Disk Image Format Specification" and [MS-VHDX].
"""

import uuid

from atoll.images.source import DAMAGED, SourceFile

COOKIE, DYNAMIC_COOKIE, VHDX_MAGIC = b"conectix", b"cxsparse", b"vhdxfile"
FOOTER = 512
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
LOCATORS, LOCATOR = 8, 24
KIB64 = 64 << 10
BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
LOGICAL_SECTOR_SIZE = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
MAX_REGIONS, MAX_METADATA = 2047, 2047
HAS_PARENT = 2
SELF_CONTAINED = "Merge it with its parent first: `Merge-VHD` or `Convert-VHD` in PowerShell."
WRONG_KIND = "Leave --format away to let Atoll find out."


def has_fixed_footer(source: SourceFile) -> bool:
    """Whether the last sector is the footer of a fixed VHD, and says so itself."""
    footer = source.peek(max(source.size - FOOTER, 0), FOOTER)
    return footer[:8] == COOKIE and int.from_bytes(footer[60:64], "big") == FIXED


def vhd_virtual_size(source: SourceFile) -> int:
    """Bytes of the disk in a fixed or dynamic VHD. Raises `ImageRefused` for any other."""
    if source.peek(0, 8) == COOKIE:
        footer = 0
    elif source.size > FOOTER and source.peek(source.size - FOOTER, 8) == COOKIE:
        footer = source.size - FOOTER
    else:
        raise source.refused("it has no VHD footer", WRONG_KIND)
    # QEMU takes the geometry instead of the size for files of some programs; that is 128 GiB at most.
    header, size = source.unpack(">Q24xQ", footer + 16)
    (kind,) = source.unpack(">I", footer + 60)
    if kind == DIFFERENCING:
        raise source.refused("it is only the difference to a parent disk", SELF_CONTAINED)
    if kind == FIXED and footer:
        source.check_table("disk", offset=0, length=size + FOOTER)
    elif kind == DYNAMIC and not footer:
        _check_dynamic(source, header, size=size)
    else:
        raise source.refused(f"a VHD of type {kind} is not supported", DAMAGED)
    return int(size)


def _check_dynamic(source: SourceFile, header: int, *, size: int) -> None:
    if source.read(header, 8) != DYNAMIC_COOKIE:
        raise source.refused("its dynamic header is missing", DAMAGED)
    table, _, entries, block = source.unpack(">QIII", header + 16)
    if block < 512 or block & (block - 1) or entries * block < size:
        raise source.refused("its block table doesn't fit the size of its disk", DAMAGED)
    source.check_table("block table", offset=table, length=entries * 4)
    locators = source.read(header + 576, LOCATORS * LOCATOR)
    if source.read(header + 40, 16) != bytes(16) or locators != bytes(LOCATORS * LOCATOR):
        raise source.refused("it names a parent disk", SELF_CONTAINED)


def vhdx_virtual_size(source: SourceFile) -> int:
    """Bytes of the disk in a self-contained, cleanly closed VHDX. Raises `ImageRefused` for any other."""
    if source.peek(0, 8) != VHDX_MAGIC:
        raise source.refused("it doesn't begin as a VHDX file does", WRONG_KIND)
    if _log_of_newest_header(source) != bytes(16):
        raise source.refused(
            "it was not closed cleanly", "Attach it once on Windows (`Mount-VHD`), or export it again."
        )
    regions: dict[uuid.UUID, tuple[int, int]] = {}
    for table in (3 * KIB64, 4 * KIB64):
        regions |= _regions(source, table)
    if BAT not in regions or METADATA not in regions:
        raise source.refused("it lacks its region table", DAMAGED)
    size, block, sector = _metadata(source, regions[METADATA][0])
    if not 1 << 20 <= block <= 256 << 20 or block & (block - 1) or sector not in (512, 4096):
        raise source.refused("its block size can't be", DAMAGED)
    data_blocks = -(-size // block)
    per_bitmap = (sector << 23) // block
    offset, length = regions[BAT]
    if (data_blocks + data_blocks // per_bitmap) * 8 > length:
        raise source.refused("its block table doesn't fit the size of its disk", DAMAGED)
    source.check_table("block table", offset=offset, length=length)
    return size


def _log_of_newest_header(source: SourceFile) -> bytes:
    """The log id of the valid header with the highest sequence number; all zeros when there is nothing to replay."""
    found = [
        (source.unpack("<Q", offset + 8)[0], source.read(offset + 48, 16))
        for offset in (KIB64, 2 * KIB64)
        if source.peek(offset, 4) == b"head"
    ]
    if not found:
        raise source.refused("it lacks its headers", DAMAGED)
    return bytes(max(found)[1])


def _regions(source: SourceFile, table: int) -> dict[uuid.UUID, tuple[int, int]]:
    if source.peek(table, 4) != b"regi":
        return {}
    (count,) = source.unpack("<I", table + 8)
    if count > MAX_REGIONS:
        raise source.refused("its region table is too big", DAMAGED)
    found = {}
    for index in range(count):
        name, offset, length = source.unpack("<16sQI", table + 16 + 32 * index)
        source.check_table("region", offset=offset, length=length)
        found[uuid.UUID(bytes_le=name)] = (offset, length)
    return found


def _metadata(source: SourceFile, table: int) -> tuple[int, int, int]:
    """Disk size, block size, sector size."""
    signature, count = source.unpack("<8s2xH", table)
    if signature != b"metadata" or count > MAX_METADATA:
        raise source.refused("it lacks its metadata", DAMAGED)
    items = {}
    for index in range(count):
        name, offset = source.unpack("<16sI", table + 32 + 32 * index)
        items[uuid.UUID(bytes_le=name)] = table + offset
    if not items.keys() >= {FILE_PARAMETERS, VIRTUAL_DISK_SIZE, LOGICAL_SECTOR_SIZE}:
        raise source.refused("its metadata is incomplete", DAMAGED)
    block, flags = source.unpack("<II", items[FILE_PARAMETERS])
    if flags & HAS_PARENT or PARENT_LOCATOR in items:
        raise source.refused("it is only the difference to a parent disk", SELF_CONTAINED)
    (size,) = source.unpack("<Q", items[VIRTUAL_DISK_SIZE])
    (sector,) = source.unpack("<I", items[LOGICAL_SECTOR_SIZE])
    return int(size), int(block), int(sector)
