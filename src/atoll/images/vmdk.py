"""Read a VMDK header and descriptor: only one self-contained file is accepted.

Layout: VMware's "Virtual Disk Format 5.0"; what QEMU reads of it: block/vmdk.c.
"""

import re

from atoll.images.source import DAMAGED, SourceFile

MAGIC = b"KDMV"
OLD_MAGIC = b"COWD"
DESCRIPTOR_START = b"# Disk DescriptorFile"
SECTOR = 512
HEADER = "<IIQQQQIQQQ"  # version … overhead; the magic stands before it
AT_END = 0xFFFF_FFFF_FFFF_FFFF
FOOTER_FROM_END, FOOTER_MARKER = 3 * SECTOR, 3
# QEMU looks for the parent in 20 sectors from the second one on, whatever the header says (vmdk_parent_open).
QEMU_DESCRIPTOR, QEMU_DESCRIPTOR_LENGTH = 0x200, 20 * SECTOR
MAX_DESCRIPTOR = 1 << 20
NO_PARENT = "ffffffff"
_EXTENT = re.compile(r'^\s*(?:RW|RDONLY|NOACCESS)\s+\d+\s+(\w+)(?:\s+"([^"]*)")?', re.MULTILINE)
_PARENT_ID = re.compile(r"^\s*parentCID\s*=\s*([0-9a-fA-F]+)", re.MULTILINE)
SELF_CONTAINED = "Export it as one file (`ovftool`, or `qemu-img convert -f vmdk -O qcow2 OLD NEW`)."


def virtual_size(source: SourceFile) -> int:
    """Bytes of the disk in a monolithic or stream-optimized VMDK. Raises `ImageRefused` for any other."""
    start = source.peek(0, len(DESCRIPTOR_START))
    if start == DESCRIPTOR_START:
        raise _text_descriptor(source)
    if start[:4] == OLD_MAGIC:
        raise source.refused("VMDK files of old ESX servers are not supported", SELF_CONTAINED)
    if start[:4] != MAGIC:
        raise source.refused("it doesn't begin as a VMDK file does", "Leave --format away to let Atoll find out.")
    size, descriptors, at_end = _header(source, 0)
    if at_end:
        footer = source.size - FOOTER_FROM_END
        if source.unpack("<QII", footer)[2] != FOOTER_MARKER or source.peek(footer + SECTOR, 4) != MAGIC:
            raise source.refused("the index at its end is missing", DAMAGED)
        size, more, again = _header(source, footer + SECTOR)
        descriptors += more
        if again:
            raise source.refused("its index is nowhere", DAMAGED)
    for offset, length in [*descriptors, (QEMU_DESCRIPTOR, QEMU_DESCRIPTOR_LENGTH)]:
        _check_descriptor(source, source.peek(offset, length).split(b"\0", 1)[0].decode(errors="replace"))
    return size


def _header(source: SourceFile, offset: int) -> tuple[int, list[tuple[int, int]], bool]:
    """Size, descriptors (offset, length), and whether the real header is at the file's end."""
    version, _, capacity, grain, descriptor, descriptor_size, entries, _, directory, _ = source.unpack(
        HEADER, offset + 4
    )
    if version not in (1, 2, 3):
        raise source.refused(f"VMDK version {version} is not supported", SELF_CONTAINED)
    if capacity == 0:
        # QEMU would then take everything, files to open included, from the descriptor.
        raise source.refused("it has no data of its own, only references", SELF_CONTAINED)
    if not 0 < entries <= 512 or not 0 < grain <= 1 << 21 or grain & (grain - 1):
        raise source.refused("its header has impossible values", DAMAGED)
    found = []
    if descriptor:
        length = descriptor_size * SECTOR
        if length > MAX_DESCRIPTOR:
            raise source.refused("its descriptor is too big", DAMAGED)
        source.check_table("descriptor", offset=descriptor * SECTOR, length=length)
        found.append((descriptor * SECTOR, length))
    if directory != AT_END:
        length = -(-capacity // (entries * grain)) * 4
        source.check_table("grain directory", offset=directory * SECTOR, length=length)
    return capacity * SECTOR, found, directory == AT_END


def _check_descriptor(source: SourceFile, text: str) -> None:
    if "parentFileNameHint" in text:
        raise source.refused("it is only the difference to a parent disk", SELF_CONTAINED)
    for parent in _PARENT_ID.findall(text):
        if parent.lower() != NO_PARENT:
            raise source.refused("it is only the difference to a parent disk", SELF_CONTAINED)
    extents = _EXTENT.findall(text)
    if len(extents) > 1:
        raise source.refused(f"its data is in {len(extents)} files", SELF_CONTAINED)
    for kind, name in extents:
        if kind.upper() != "SPARSE" or re.search(r"[/\\]|^json:", name):
            raise source.refused(f"its data is in another file or device ({kind} {name!r})", SELF_CONTAINED)


def _text_descriptor(source: SourceFile) -> Exception:
    extents = _EXTENT.findall(source.peek(0, MAX_DESCRIPTOR).decode(errors="replace"))
    flat = [name for kind, name in extents if kind.upper() in ("FLAT", "VMFS")]
    if len(extents) == 1 and flat:
        return source.refused(
            f"it is only a description; the disk is in {flat[0]!r}", "Import that file with --format raw."
        )
    return source.refused("it is only a description of a disk in other files", SELF_CONTAINED)
