"""What a foreign file is, decided by its bytes or by the user's word, and whether it is safe to read.

QEMU's own probing is never used: a guest that may write its raw disk could put a qcow2 header there which names a file
of the host. So the user's `raw` stays raw whatever the bytes say, and every other format is parsed here, before any
program of QEMU's sees the file, and is refused when it refers to anything outside itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from atoll.images import plain, qcow2, vdi, vhd, vmdk
from atoll.images.source import SourceFile
from atoll.model.image import SourceFormat
from atoll.model.spec import Arch
from atoll.model.units import TIB, format_size

MAX_VIRTUAL_SIZE = 16 * TIB
"""Bytes. As much as ext4 and most others make of one disk, and far less than a header can claim."""

# What people try to import and what to do with it instead: offset, magic, kind, advice.
NOT_IMAGES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xfd7zXZ\x00", "compressed with xz", "Decompress it first: `xz -dk FILE`."),
    (0, b"\x1f\x8b", "compressed with gzip", "Decompress it first: `gzip -dk FILE`."),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "Decompress it first: `zstd -dk FILE`."),
    (0, b"BZh", "compressed with bzip2", "Decompress it first: `bzip2 -dk FILE`."),
    (0, b"PK\x03\x04", "a ZIP archive", "Unpack it first, then import the image in it."),
    (0, b"atoll-bundle-", "a machine that Atoll exported", "Import it with `atoll import FILE`."),
    (257, b"ustar", "a tar archive (OVA files are)", "Unpack it first: `tar -xf FILE`, then import the disk in it."),
    (0, b"LUKS\xba\xbe", "encrypted with LUKS", "Import it with --format raw if the guest shall decrypt it."),
)


@dataclass(frozen=True)
class Inspection:
    """A file that is safe to use: its format, and the bytes of the disk that a guest sees."""

    format: SourceFormat
    virtual_size: int
    arch: Arch | None = None
    """Of a kernel."""


def inspect(source: SourceFile, wanted: SourceFormat | None = None) -> Inspection:
    """Decide the format (or take the user's word) and check the whole header.

    Raises `ImageRefused` for a file that is unknown, damaged, dangerous, too big, or not of the `wanted` format.
    """
    kind = wanted or detect(source)
    size = _SIZES[kind](source)
    if size == 0:
        raise source.refused("its disk has no bytes", "Make it anew.")
    if size > MAX_VIRTUAL_SIZE:
        raise source.refused(
            f"its disk claims to have {format_size(size)}, more than {format_size(MAX_VIRTUAL_SIZE)}",
            "Shrink the disk, or make a new one and copy what is needed.",
        )
    return Inspection(kind, size, plain.kernel_arch(source) if kind == "kernel" else None)


def detect(source: SourceFile) -> SourceFormat:
    """The format by the bytes alone. Raises `ImageRefused` when they don't say."""
    for kind, fits in _SIGNS:
        if fits(source):
            return kind
    for offset, magic, what, advice in NOT_IMAGES:
        if source.peek(offset, len(magic)) == magic:
            raise source.refused(f"it is {what}", advice)
    raise source.refused("nothing in it says what it is", "If it is the plain bytes of a disk, say so: --format raw.")


def _begins(*magics: bytes, offset: int = 0) -> Callable[[SourceFile], bool]:
    return lambda source: any(source.peek(offset, len(magic)) == magic for magic in magics)


def _raw_size(source: SourceFile) -> int:
    return source.size


# The order matters where one file fits several: containers first, a hybrid ISO before the raw disk that it also is.
_SIGNS: tuple[tuple[SourceFormat, Callable[[SourceFile], bool]], ...] = (
    ("qcow2", _begins(qcow2.MAGIC)),
    ("vmdk", _begins(vmdk.MAGIC, vmdk.OLD_MAGIC, vmdk.DESCRIPTOR_START)),
    ("vhdx", _begins(vhd.VHDX_MAGIC)),
    ("vpc", _begins(vhd.COOKIE)),
    ("vdi", _begins(vdi.MAGIC, offset=vdi.MAGIC_OFFSET)),
    ("iso", plain.is_iso),
    ("kernel", lambda source: plain.kernel_arch(source) is not None),
    ("vpc", vhd.has_fixed_footer),
    ("floppy", plain.is_floppy),
    ("raw", plain.is_raw),
)

_SIZES: dict[SourceFormat, Callable[[SourceFile], int]] = {
    "qcow2": qcow2.virtual_size,
    "raw": _raw_size,
    "vmdk": vmdk.virtual_size,
    "vdi": vdi.virtual_size,
    "vpc": vhd.vhd_virtual_size,
    "vhdx": vhd.vhdx_virtual_size,
    "iso": plain.iso_size,
    "floppy": plain.floppy_size,
    "kernel": plain.kernel_size,
}
