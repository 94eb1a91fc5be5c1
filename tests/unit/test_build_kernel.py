"""A packed kernel comes out as the one that went in, whatever packed it; a damaged one is refused."""

import gzip
import lzma
import struct
import subprocess

import pytest

from atoll.errors import ImageRefused
from atoll.images.kernel import decompressed, has_pvh_entry

PVH_NOTE, OTHER_NOTE = 18, 5


def vmlinux(note: int = PVH_NOTE) -> bytes:
    """An ELF with one note of that type, and 200 kB that are worth packing."""
    notes = struct.pack("<III", 4, 4, note) + b"Xen\0" + struct.pack("<I", 0x1000000)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(notes), len(notes), 4)
    return header + program + notes + bytes(range(256)) * 800


def bzimage(payload: bytes, *, version: int = 0x020F) -> bytes:
    """A kernel file as x86 boot loaders know it: setup sectors, then the decompressor with the payload in it."""
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    return bytes(setup) + bytes(64) + payload + b"the decompressor goes on"


def packed(data: bytes, how: str) -> bytes:
    # The kernel's build appends the length in four bytes to all but gzip's output.
    length = struct.pack("<I", len(data))
    if how == "gzip":
        return gzip.compress(data)
    if how == "xz":
        return lzma.compress(data, check=lzma.CHECK_CRC32) + length
    if how == "lzma":
        return lzma.compress(data, format=lzma.FORMAT_ALONE) + length
    options = {"zstd": ["-qc"], "lz4": ["-qlc"]}[how]
    return subprocess.run([how, *options], input=data, capture_output=True, check=True).stdout + length


@pytest.mark.parametrize("how", ["gzip", "xz", "lzma", "zstd", "lz4"])
async def test_the_kernel_comes_out_of_a_bzimage(how: str) -> None:
    assert await decompressed(bzimage(packed(vmlinux(), how))) == vmlinux()


async def test_a_bzimage_whose_kernel_has_no_pvh_entry_stays_as_it_is() -> None:
    image = bzimage(packed(vmlinux(OTHER_NOTE), "gzip"))
    assert await decompressed(image) == image


async def test_a_packed_arm_image_is_unpacked_and_a_plain_one_left_alone() -> None:
    plain = b"MZ" + bytes(54) + b"ARM\x64" + bytes(1000)
    assert await decompressed(gzip.compress(plain)) == plain
    assert await decompressed(plain) == plain


async def test_an_efi_zboot_image_gives_its_payload() -> None:
    payload = packed(b"Image" * 1000, "zstd")[:-4]
    zboot = b"MZ\0\0zimg" + struct.pack("<II", 64, len(payload)) + bytes(48) + payload + b"more"
    assert await decompressed(zboot) == b"Image" * 1000


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        (bzimage(packed(vmlinux(), "xz"))[:3000], "beyond the end"),
        (bzimage(b"\xfd7zXZ\x00" + b"nonsense" * 10), "can't be decompressed"),
        (bzimage(b"\x28\xb5\x2f\xfd" + b"nonsense" * 10), "can't be decompressed"),
        (bzimage(b"unheard of"), "unknown"),
        (bzimage(packed(vmlinux(), "xz"), version=0x0207), "too old"),
    ],
)
async def test_a_damaged_kernel_is_refused(damaged: bytes, why: str) -> None:
    with pytest.raises(ImageRefused, match=why):
        await decompressed(damaged)


def test_only_a_whole_elf_with_the_note_has_a_pvh_entry() -> None:
    assert has_pvh_entry(vmlinux())
    assert not has_pvh_entry(vmlinux(OTHER_NOTE))
    assert not has_pvh_entry(vmlinux()[:70])
    assert not has_pvh_entry(b"\x7fELF\x02")
    assert not has_pvh_entry(b"no ELF at all")
