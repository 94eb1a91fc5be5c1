"""Small image files written by hand, each valid and self-contained, with places to spoil them."""

import struct
import uuid

MIB = 1 << 20


def qcow2(
    *,
    version: int = 3,
    size: int = MIB,
    backing: bytes = b"",
    encryption: int = 0,
    incompatible: int = 0,
    extensions: bytes = b"",
    cluster_bits: int = 16,
    l1_entries: int = 1,
    l1_offset: int = 3 << 16,
    refcount_clusters: int = 1,
    snapshots: int = 0,
    l1_table: bytes = b"",
) -> bytes:
    cluster = 1 << 16
    backing_offset = 512 if backing else 0
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        backing_offset,
        len(backing),
        cluster_bits,
        size,
        encryption,
        l1_entries,
        l1_offset,
        cluster,
        refcount_clusters,
        snapshots,
        4 * cluster,
    )
    if version == 3:
        header += struct.pack(">QQQII", incompatible, 0, 0, 4, 104)
    first = (header + extensions + bytes(8)).ljust(512, b"\0") + backing
    return first.ljust(cluster, b"\0") + bytes(2 * cluster) + l1_table.ljust(cluster, b"\0") + bytes(cluster)


def qcow2_extension(kind: int, content: bytes) -> bytes:
    return struct.pack(">II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")


VMDK_DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="monolithicSparse"

RW 2048 SPARSE "disk.vmdk"
"""


def vmdk(
    *,
    descriptor: str = VMDK_DESCRIPTOR,
    capacity: int = 2048,
    entries: int = 512,
    grain: int = 128,
    directory: int = 21,
) -> bytes:
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, capacity, grain, 1, 20, entries, 0, directory, 128)
    return header.ljust(512, b"\0") + descriptor.encode().ljust(20 * 512, b"\0") + bytes(128 * 512)


def vmdk_stream(*, footer_descriptor: str = VMDK_DESCRIPTOR) -> bytes:
    """A stream-optimized file: its first header says that the real one is at the end."""
    start = vmdk(directory=(1 << 64) - 1)
    at_end = len(start) // 512
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 3, 3, 2048, 128, at_end, 20, 512, 0, 21, 128).ljust(512, b"\0")
    return start + footer_descriptor.encode().ljust(20 * 512, b"\0") + marker + header + bytes(512)


def vdi(*, kind: int = 1, size: int = 2 * MIB, blocks: int = 2, allocated: int = 0, parent: bytes = bytes(16)) -> bytes:
    header = b"<<< A disk >>>\n".ljust(64, b"\0") + struct.pack("<IIIII", 0xBEDA107F, 0x10001, 0x190, kind, 0)
    header = header.ljust(340, b"\0") + struct.pack(
        "<IIIIIIIQIIII", 512, 1024, 0, 0, 0, 512, 0, size, MIB, 0, blocks, allocated
    )
    header = header.ljust(424, b"\0") + bytes(16) + parent
    return header.ljust(1024, b"\0")


def vhd_footer(*, kind: int, size: int = MIB, header: int = 0xFFFF_FFFF_FFFF_FFFF) -> bytes:
    footer = struct.pack(
        ">8sIIQI4sI4sQQHBBI", b"conectix", 2, 0x10000, header, 0, b"win ", 0, b"Wi2k", size, size, 30, 4, 17, kind
    )
    return footer.ljust(512, b"\0")


def vhd_fixed(*, size: int = MIB) -> bytes:
    return bytes(size) + vhd_footer(kind=2, size=size)


def vhd_dynamic(
    *,
    kind: int = 3,
    size: int = MIB,
    entries: int = 1,
    block: int = 2 * MIB,
    parent: bytes = bytes(16),
    locator: int = 0,
) -> bytes:
    header = struct.pack(">8sQQIII", b"cxsparse", 0xFFFF_FFFF_FFFF_FFFF, 1536, 0x10000, entries, block)
    header = header.ljust(40, b"\0") + parent
    header = header.ljust(576, b"\0") + struct.pack(">I", locator)
    footer = vhd_footer(kind=kind, size=size, header=512)
    return footer + header.ljust(1024, b"\0") + b"\xff" * 512 + footer


def vhdx(
    *, size: int = MIB, block: int = MIB, flags: int = 0, log: bytes = bytes(16), parent_locator: bool = False
) -> bytes:
    kib64 = 64 << 10
    header = struct.pack("<4sIQ", b"head", 0, 7).ljust(48, b"\0") + log
    regions = struct.pack("<4sIII", b"regi", 0, 2, 0)
    regions += uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le + struct.pack("<QII", 6 * kib64, kib64, 1)
    regions += uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le + struct.pack("<QII", 5 * kib64, kib64, 1)
    items = [
        ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", struct.pack("<II", block, flags)),
        ("2fa54224-cd1b-4876-b211-5dbed83bf4b8", struct.pack("<Q", size)),
        ("8141bf1d-a96f-4709-ba47-f233a8faab5f", struct.pack("<I", 512)),
    ]
    if parent_locator:
        items.append(("a8d35f2d-b30b-454d-abf7-d3d84834ab0c", bytes(8)))
    metadata = struct.pack("<8sHH", b"metadata", 0, len(items)).ljust(32, b"\0")
    values = b""
    for name, value in items:
        metadata += uuid.UUID(name).bytes_le + struct.pack("<IIII", 4096 + len(values), len(value), 0, 0)
        values += value
    parts = [b"vhdxfile", header, header, regions, regions, metadata.ljust(4096, b"\0") + values, b""]
    return b"".join(part.ljust(kib64, b"\0") for part in parts)


def iso(*, blocks: int = 20) -> bytes:
    descriptor = b"\x01CD001\x01".ljust(80, b"\0") + struct.pack("<I", blocks)
    descriptor = descriptor.ljust(128, b"\0") + struct.pack("<H", 2048)
    return (bytes(16 * 2048) + descriptor).ljust(20 * 2048, b"\0")


def boot_sector(*, length: int = MIB) -> bytes:
    return (bytes(510) + b"\x55\xaa").ljust(length, b"\0")


def bzimage() -> bytes:
    return (bytes(510) + b"\x55\xaa\xeb\x00HdrS\x0f\x02").ljust(4096, b"\0")


def arm64_image() -> bytes:
    return bytes(56) + b"ARM\x64" + bytes(1000)


def elf(*, machine: int = 62, header_types: tuple[int, ...] = (1,)) -> bytes:
    start = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, len(header_types)
    )
    table = b"".join(struct.pack("<I", kind).ljust(56, b"\0") for kind in header_types)
    return (start.ljust(64, b"\0") + table).ljust(4096, b"\0")


EVERY_KIND = {
    "qcow2": qcow2(),
    "vmdk": vmdk(),
    "vdi": vdi(),
    "vhdx": vhdx(),
    "vpc": vhd_dynamic(),
    "iso": iso(),
    "kernel": bzimage(),
    "floppy": boot_sector(length=1440 * 1024),
    "raw": boot_sector(),
}
