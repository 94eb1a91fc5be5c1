"""What a foreign file is, and everything that makes it dangerous, decided by its bytes alone."""

import os
import re
import struct
import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers import image_files as files

from atoll.errors import ImageRefused, StorageFailed
from atoll.images import formats
from atoll.images.formats import Inspection, inspect
from atoll.images.source import opened
from atoll.model.image import SourceFormat

TIB = 1 << 40


def inspected(content: bytes, folder: Path, wanted: SourceFormat | None = None) -> Inspection:
    path = folder / "file"
    path.write_bytes(content)
    with opened(path) as source:
        return inspect(source, wanted)


@pytest.mark.parametrize("kind", files.EVERY_KIND)
def test_each_format_is_known_by_its_bytes(kind: str, tmp_path: Path) -> None:
    assert inspected(files.EVERY_KIND[kind], tmp_path).format == kind


@pytest.mark.parametrize(
    ("content", "kind", "size"),
    [
        (files.qcow2(version=2, size=12345), "qcow2", 12345),
        (files.vmdk_stream(), "vmdk", 1 << 20),
        (files.vhd_fixed(size=3 << 20), "vpc", 3 << 20),
        (files.vhdx(size=5 << 20), "vhdx", 5 << 20),
        (files.vdi(size=1000), "vdi", 1000),
        (files.boot_sector()[:512] + files.iso()[512:], "iso", 40960),
        (bytes(512) + b"EFI PART" + bytes(9000), "raw", 9520),
        (bytes(1080) + b"\x53\xef" + bytes(9000), "raw", 10082),
    ],
    ids=["qcow2 v2", "stream-optimized", "fixed VHD", "VHDX", "VDI", "hybrid ISO", "GPT", "bare ext4"],
)
def test_variants_are_known_with_the_size_of_their_disk(content: bytes, kind: str, size: int, tmp_path: Path) -> None:
    found = inspected(content, tmp_path)
    assert (found.format, found.virtual_size) == (kind, size)


@pytest.mark.parametrize(
    ("content", "arch"),
    [(files.bzimage(), "x86_64"), (files.arm64_image(), "aarch64"), (files.elf(machine=243), "riscv64")],
)
def test_kernels_tell_their_machine(content: bytes, arch: str, tmp_path: Path) -> None:
    assert inspected(content, tmp_path).arch == arch


OUTSIDE = {
    "a qcow2 backing file": files.qcow2(backing=b"/etc/shadow"),
    "a qcow2 backing file by URL": files.qcow2(version=2, backing=b"nbd://example.org/x"),
    "a qcow2 backing file as JSON": files.qcow2(backing=b'json:{"driver":"file","filename":"/etc/shadow"}'),
    "a qcow2 external data file": files.qcow2(incompatible=4),
    "a qcow2 data file's name": files.qcow2(extensions=files.qcow2_extension(0x44415441, b"/etc/shadow")),
    "a VMDK parent": files.vmdk(descriptor=files.VMDK_DESCRIPTOR + 'parentFileNameHint="../base.vmdk"\n'),
    "a VMDK parent's id": files.vmdk(descriptor=files.VMDK_DESCRIPTOR.replace("ffffffff", "12345678")),
    "a VMDK extent elsewhere": files.vmdk(descriptor=files.VMDK_DESCRIPTOR.replace("disk.vmdk", "../../etc/shadow")),
    "a VMDK extent as JSON": files.vmdk(descriptor=files.VMDK_DESCRIPTOR.replace("disk.vmdk", "json:{}")),
    "a VMDK on a device": files.vmdk(descriptor=files.VMDK_DESCRIPTOR.replace("SPARSE", "FLAT")),
    "a VMDK in two files": files.vmdk(descriptor=files.VMDK_DESCRIPTOR + 'RW 1 SPARSE "two.vmdk"\n'),
    "a VMDK without data": files.vmdk(capacity=0),
    "a VMDK parent told only at the end": files.vmdk_stream(
        footer_descriptor=files.VMDK_DESCRIPTOR + 'parentFileNameHint="x"\n'
    ),
    "a VMDK description": files.VMDK_DESCRIPTOR.replace("SPARSE", "FLAT").encode(),
    "a VDI difference": files.vdi(kind=4),
    "a VDI parent": files.vdi(parent=b"p" * 16),
    "a VHD difference": files.vhd_dynamic(kind=4),
    "a VHD parent's id": files.vhd_dynamic(parent=b"p" * 16),
    "a VHD parent's place": files.vhd_dynamic(locator=0x57326B75),
    "a VHDX with a parent": files.vhdx(flags=2),
    "a VHDX parent's place": files.vhdx(parent_locator=True),
}


@pytest.mark.parametrize("content", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_what_points_outside_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ImageRefused) as refusal:
        inspected(content, tmp_path)
    assert re.search(
        r"another file|to a parent disk|names a parent|in 2 files|only references|the disk is in '", refusal.value.why
    )


BAD = {
    "LUKS in qcow2": (files.qcow2(encryption=2), "encrypted"),
    "qcow2 encryption header": (files.qcow2(extensions=files.qcow2_extension(0x0537BE77, bytes(16))), "encrypted"),
    "unknown qcow2 features": (files.qcow2(incompatible=1 << 40), "not known"),
    "a corrupt qcow2": (files.qcow2(incompatible=2), "marked as corrupt"),
    "qcow version 1": (files.qcow2(version=1), "version 1"),
    "a disk of 8 EiB": (files.qcow2(size=1 << 63, l1_entries=1 << 22, cluster_bits=21), "behind its end|fit"),
    "a disk of 17 TiB": (files.vmdk(capacity=17 * TIB // 512, grain=1 << 21), "17TiB"),
    "an L1 table for another disk": (files.qcow2(size=1 << 40), "L1 table"),
    "an L1 table of 4 GiB": (files.qcow2(l1_entries=1 << 29), "L1 table"),
    "an L1 table behind the end": (files.qcow2(l1_offset=1 << 60), "behind its end"),
    "endless refcounts": (files.qcow2(refcount_clusters=1 << 30), "refcount table"),
    "endless snapshots": (files.qcow2(snapshots=1 << 31), "snapshots"),
    "1,000 L1 entries for one table": (
        files.qcow2(size=1 << 38, l1_entries=1000, l1_table=struct.pack(">Q", 4 << 16) * 1000),
        "more entries than the file has room for",
    ),
    "a long extension": (files.qcow2(extensions=struct.pack(">II", 1, 0xFFFFFFFF)), "extension"),
    "a grain directory behind the end": (files.vmdk(capacity=1 << 40, grain=8, entries=1), "grain directory"),
    "a VDI map behind the end": (files.vdi(size=1 << 50, blocks=1 << 30), "block map"),
    "a cut VDI": (files.vdi(allocated=2), "data lies behind"),
    "a VHD table behind the end": (files.vhd_dynamic(entries=1 << 31), "block table"),
    "a VHD table that is too short": (files.vhd_dynamic(size=1 << 40), "block table"),
    "a cut fixed VHD": (files.vhd_fixed()[512:], "behind its end"),
    "a VHDX to be recovered": (files.vhdx(log=b"l" * 16), "not closed cleanly"),
    "a VHDX table for another disk": (files.vhdx(size=1 << 50), "block table"),
    "a cut ISO": (files.iso(blocks=4000), "its end is missing"),
    "an encrypted disk": (b"LUKS\xba\xbe" + bytes(600), "LUKS"),
    "xz": (b"\xfd7zXZ\x00" + bytes(600), "xz -dk"),
    "an OVA": (bytes(257) + b"ustar" + bytes(600), "tar -xf"),
    "a program": (files.elf(header_types=(6, 3, 1)), "nothing in it says what it is"),
    "noise": (bytes(range(256)) * 8, "--format raw"),
}


@pytest.mark.parametrize(("content", "why"), BAD.values(), ids=BAD.keys())
def test_bombs_and_broken_files_are_refused(content: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(ImageRefused, match=why):
        inspected(content, tmp_path)


def test_the_users_raw_stays_raw_with_a_forged_header(tmp_path: Path) -> None:
    forged = files.qcow2(backing=b"/etc/shadow")
    assert inspected(forged, tmp_path, "raw") == Inspection("raw", len(forged))


@pytest.mark.parametrize("wanted", ["qcow2", "vmdk", "vdi", "vpc", "vhdx", "iso", "floppy"])
def test_the_users_word_for_another_format_needs_its_header(wanted: SourceFormat, tmp_path: Path) -> None:
    with pytest.raises(ImageRefused):
        inspected(files.boot_sector(), tmp_path, wanted)


def test_a_sparse_file_of_32_tib_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "huge.raw"
    with path.open("wb") as file:
        file.write(files.boot_sector(length=512))
        try:
            file.truncate(15 * TIB)
        except OSError:
            pytest.skip("this file system has no files of 15 TiB")
    with opened(path) as source:
        assert inspect(source).virtual_size == 15 * TIB
        object.__setattr__(source, "size", 32 * TIB)
        with pytest.raises(ImageRefused, match="more than 16TiB"):
            inspect(source)


def test_what_is_no_file_is_one_clear_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    expected = {
        tmp_path: "a folder",
        tmp_path / "pipe": "a pipe",
        tmp_path / "empty": "it is empty",
        Path("/dev/null"): "a device",
        tmp_path / "loop": "can't read",
        tmp_path / "missing\x1b[31m": r"missing\\x1b\[31m: No such file",
        tmp_path / "nul\0": "can't read",
        tmp_path / ("long" * 100): "can't read",
    }
    for path, why in expected.items():
        with pytest.raises((ImageRefused, StorageFailed), match=why), opened(path):
            pass


def test_a_change_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(files.boot_sector())
    with opened(path) as source:
        source.check_unchanged()
        status = path.stat()
        time.sleep(0.02)  # longer than a tick of the kernel's file clock
        with path.open("r+b") as file:
            file.write(b"!")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(ImageRefused, match="was changed while it was read"):
            source.check_unchanged()


@pytest.mark.parametrize("kind", files.EVERY_KIND)
def test_the_first_bytes_alone_are_refused(kind: str, tmp_path: Path) -> None:
    for length in (1, 4, 8, 14, 20, 72, 100, 104, 600):
        try:
            inspected(files.EVERY_KIND[kind][:length], tmp_path)
        except ImageRefused:
            continue
        assert kind in ("raw", "floppy", "kernel")  # the rest of these may be anything


def test_an_elf_that_ends_at_once_is_no_kernel(tmp_path: Path) -> None:
    with pytest.raises(ImageRefused, match="nothing in it"):
        inspected(files.elf()[:14], tmp_path)


def test_a_backing_name_at_the_end_of_the_universe_is_still_refused(tmp_path: Path) -> None:
    content = bytearray(files.qcow2())
    content[8:16] = b"\xff" * 8
    with pytest.raises(ImageRefused, match="backing file"):
        inspected(bytes(content), tmp_path)


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(files.EVERY_KIND)),
    cuts=st.integers(0, 1 << 20),
    changes=st.lists(st.tuples(st.integers(0, 1100), st.binary(min_size=1, max_size=8)), max_size=6),
    base=st.sampled_from([0, 512, 64 << 10, 3 * 64 << 10, 5 * 64 << 10, (5 * 64 << 10) + 4096]),
    wanted=st.sampled_from([None, *get_args(SourceFormat)]),
)
def test_damaged_headers_never_do_worse_than_be_refused(
    kind: str,
    cuts: int,
    changes: list[tuple[int, bytes]],
    base: int,
    wanted: SourceFormat | None,
    tmp_path: Path,
) -> None:
    content = bytearray(files.EVERY_KIND[kind])
    for offset, piece in changes:
        content[base + offset : base + offset + len(piece)] = piece
    content = content[: max(1, len(content) - cuts)] if cuts % 3 == 0 else content
    try:
        found = inspected(bytes(content), tmp_path, wanted)
    except ImageRefused:
        return
    assert 0 < found.virtual_size <= formats.MAX_VIRTUAL_SIZE


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=3000), wanted=st.sampled_from([None, *get_args(SourceFormat)]))
def test_noise_never_does_worse_than_be_refused(content: bytes, wanted: SourceFormat | None, tmp_path: Path) -> None:
    try:
        inspected(content, tmp_path, wanted)
    except ImageRefused:
        return
