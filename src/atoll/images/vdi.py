"""Read a VirtualBox VDI header (layout: VirtualBox's VDICore.h, QEMU's block/vdi.c)."""

from atoll.images.source import DAMAGED, SourceFile

MAGIC = b"\x7f\x10\xda\xbe"
MAGIC_OFFSET = 64
VERSION = 0x0001_0001
DYNAMIC, FIXED = 1, 2
BLOCK = 1 << 20
NO_UUID = bytes(16)
SELF_CONTAINED = "Clone it to a full disk first: `VBoxManage clonemedium OLD NEW --format VDI`."


def virtual_size(source: SourceFile) -> int:
    """Bytes of the disk in a self-contained VDI file. Raises `ImageRefused` for any other."""
    if source.peek(MAGIC_OFFSET, 4) != MAGIC:
        raise source.refused("it doesn't begin as a VDI file does", "Leave --format away to let Atoll find out.")
    version, _, kind = source.unpack("<III", 68)
    map_offset, data_offset, _, _, _, sector_size, _, size, block_size, extra, blocks, allocated = source.unpack(
        "<IIIIIIIQIIII", 340
    )
    if version != VERSION:
        raise source.refused(f"VDI version {version:#x} is not supported", SELF_CONTAINED)
    if kind not in (DYNAMIC, FIXED) or source.read(424, 32) != NO_UUID * 2:
        raise source.refused("it is only the difference to a parent disk", SELF_CONTAINED)
    if sector_size != 512 or block_size != BLOCK or extra:
        raise source.refused("its block size is not one that VirtualBox uses", DAMAGED)
    if size > blocks * block_size or allocated > blocks:
        raise source.refused("its block map doesn't fit the size of its disk", DAMAGED)
    source.check_table("block map", offset=map_offset, length=blocks * 4)
    source.check_table("data", offset=data_offset, length=allocated * block_size)
    return int(size)
