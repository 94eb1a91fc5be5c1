"""Files that become images as they are: CDs, floppies and kernels; and what an import refuses."""

import asyncio
import hashlib
import lzma
import os
from pathlib import Path

import pytest
from tests.helpers import image_files as files

from atoll.errors import ImageRefused, InvalidInput
from atoll.images.importer import import_file, name_from
from atoll.images.made import Made
from atoll.images.source import opened
from atoll.images.unpack import unxz
from atoll.model.requests import ImportRequest


async def imported(path: Path, folder: Path, **options: object) -> Made:
    folder.mkdir(exist_ok=True)
    request = ImportRequest(path=str(path), **options)  # type: ignore[arg-type]
    return await import_file(request, folder=folder, report=lambda _: None)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


async def test_an_iso_becomes_a_read_only_cd(tmp_path: Path) -> None:
    source = written(tmp_path / "Rescue CD (x64).ISO", files.iso())
    made = await imported(source, tmp_path / "made", arch="x86_64")
    assert made.image.name == "rescue-cd-x64:latest"
    assert (made.image.firmware, made.image.firmwares) == ("bios", ("bios", "uefi"))
    [disk] = made.image.disks
    assert (disk.media, disk.bus, disk.blob) == ("cdrom", "sata", digest(files.iso()))
    assert disk.size == len(files.iso())
    [(path, sha256)] = made.blobs
    assert path.parent == tmp_path / "made"
    assert (path.read_bytes(), sha256) == (files.iso(), disk.blob)
    assert not made.layers


async def test_a_floppy_goes_into_a_pcs_drive(tmp_path: Path) -> None:
    source = written(tmp_path / "boot.ima", files.EVERY_KIND["floppy"])
    made = await imported(source, tmp_path / "made")
    assert (made.image.arch, made.image.firmwares) == ("x86_64", ("bios",))
    assert made.image.disks[0].bus == "floppy"


async def test_a_kernel_boots_directly_with_its_initrd(tmp_path: Path) -> None:
    kernel = written(tmp_path / "Image", files.arm64_image())
    initrd = written(tmp_path / "initrd", b"cpio")
    made = await imported(kernel, tmp_path / "made", initrd=str(initrd), cmdline="console=ttyAMA0")
    image = made.image
    assert (image.arch, image.firmware, image.firmwares) == ("aarch64", "kernel", ("kernel",))
    assert (image.kernel, image.initrd) == (digest(files.arm64_image()), digest(b"cpio"))
    assert image.cmdline == "console=ttyAMA0"
    assert {path.read_bytes(): sha for path, sha in made.blobs} == {
        files.arm64_image(): image.kernel,
        b"cpio": image.initrd,
    }


async def test_a_copy_keeps_holes(tmp_path: Path) -> None:
    source = written(tmp_path / "big.iso", files.iso())
    os.truncate(source, 1 << 28)
    made = await imported(source, tmp_path / "made")
    status = made.blobs[0][0].stat()
    assert (status.st_size, status.st_blocks * 512 < 8 << 20) == (1 << 28, True)


async def test_odd_names_are_only_names(tmp_path: Path) -> None:
    for name in ("--help", "-f raw", "nbd:example.org", "json:{}", "a,b=c", "💾 \n.iso", "%s"):
        made = await imported(written(tmp_path / name, files.iso()), tmp_path / "made")
        assert made.image.source.isprintable()
        made.blobs[0][0].unlink()


@pytest.mark.parametrize(
    ("file_name", "name"),
    [("Debian 12 (net).QCOW2", "debian-12-net"), ("disk.qcow2.xz", "disk"), ("💾", "image"), ("--x.vmdk", "x")],
)
def test_a_name_is_made_from_the_files(file_name: str, name: str) -> None:
    assert name_from(file_name) == name


async def test_options_that_do_not_fit_are_told_and_nothing_is_made(tmp_path: Path) -> None:
    iso, kernel = written(tmp_path / "a.iso", files.iso()), written(tmp_path / "k", files.bzimage())
    for path, options in (
        (iso, {"initrd": str(kernel)}),
        (iso, {"cmdline": "quiet"}),
        (iso, {"firmware": "kernel"}),
        (kernel, {"arch": "riscv64"}),
        (iso, {"name": "Bad Name"}),
    ):
        with pytest.raises(InvalidInput):
            await imported(path, tmp_path / "made", **options)
    assert not list((tmp_path / "made").iterdir())


async def test_a_dangerous_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageRefused, match="/etc/shadow"):
        await imported(written(tmp_path / "x", files.qcow2(backing=b"/etc/shadow")), tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


async def test_a_file_that_grows_meanwhile_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "a.iso", files.iso())
    request = ImportRequest(path=str(source))
    folder = tmp_path / "made"
    folder.mkdir()

    def spoil(_: object) -> None:
        with source.open("ab") as file:
            file.write(b"more")

    with pytest.raises(ImageRefused, match="changed while it was read"):
        # The report comes before the last look at the file.
        await import_file(request, folder=folder, report=spoil)


async def test_a_cancelled_import_stops_reading(tmp_path: Path) -> None:
    source = written(tmp_path / "big.iso", files.iso())
    os.truncate(source, 1 << 40)
    task = asyncio.create_task(imported(source, tmp_path / "made"))
    await asyncio.sleep(0.1)
    task.cancel()
    async with asyncio.timeout(2):
        with pytest.raises(asyncio.CancelledError):
            await task


async def unpacked(content: bytes, folder: Path) -> bytes:
    target = folder / "out"
    target.unlink(missing_ok=True)
    with opened(written(folder / "file.xz", content)) as source:
        await unxz(source, target=target, report=lambda _: None)
    return target.read_bytes()


async def test_xz_files_are_unpacked_with_all_their_streams(tmp_path: Path) -> None:
    one, two = os.urandom(3 << 20) + bytes(5 << 20), b"end"
    assert await unpacked(lzma.compress(one), tmp_path) == one
    assert await unpacked(lzma.compress(one) + bytes(8) + lzma.compress(two) + bytes(4), tmp_path) == one + two
    assert (tmp_path / "out").stat().st_blocks * 512 < 6 << 20


async def test_broken_and_endless_xz_files_are_refused(tmp_path: Path) -> None:
    good = lzma.compress(os.urandom(100_000))
    for content in (good[:-10], good[:50] + b"damage" + good[56:], good + b"rubbish"):
        with pytest.raises(ImageRefused, match="can't be decompressed"):
            await unpacked(content, tmp_path)
    bomb = lzma.compress(bytes(160 << 20), preset=0)
    with pytest.raises(ImageRefused, match="it grows beyond"):
        await unpacked(bomb, tmp_path)
