"""What a guest may send, and what becomes of it on the host."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from atoll.errors import AtollError, GuestFailed, InvalidInput
from atoll.operations.guest_tar import Extraction, archive, total_size


def member(name: str, content: bytes = b"", **facts: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT) as file:
        for info, content in members:
            file.addfile(info, io.BytesIO(content))
    return whole.getvalue()


async def extract(sent: bytes, target: Path, kind: str = "folder") -> None:
    extraction = Extraction(target, report=None)
    try:
        extraction.feed(f"{kind} {len(sent)}\n".encode())
        extraction.feed(sent)
        await extraction.drain()
        await extraction.finish()
    finally:
        await extraction.close()


async def test_a_folder_survives_the_way_there_and_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "odd\nname -é😀").write_bytes(os.urandom(700_000))
    (source / os.fsdecode(b"\xff")).write_bytes(b"not UTF-8")
    (source / ("n" * 200)).write_text("long")
    (source / "sub" / "script").write_text("#!")
    (source / "sub" / "script").chmod(0o775)
    (source / "link").symlink_to("/nowhere at all")
    os.utime(source / "sub" / "script", (10**9, 10**9))
    (source / "sub").chmod(0o555)
    sent = b"".join([data async for data in archive(source)])

    await extract(sent, tmp_path / "target")

    target = tmp_path / "target"
    found = {p.relative_to(target): p.lstat() for p in target.rglob("*")}
    assert {name: facts.st_mode for name, facts in found.items() if name.name != "link"} == {
        p.relative_to(source): p.lstat().st_mode for p in source.rglob("*") if p.name != "link"
    }
    assert all(
        (target / name).read_bytes() == (source / name).read_bytes() for name in found if (target / name).is_file()
    )
    assert (target / "link").readlink() == Path("/nowhere at all")
    assert (target / "sub" / "script").stat().st_mtime == 10**9
    assert total_size(source) >= 700_000
    (source / "sub").chmod(0o755)
    (target / "sub").chmod(0o755)


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "./../out"])
async def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(GuestFailed, match="elsewhere"):
        await extract(tar(member("fine", b"1"), member(name, b"evil")), inner / "target")
    assert list(tmp_path.rglob("*")) == [inner]


async def test_nothing_is_written_through_a_link_that_the_guest_sent(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    sent = tar(member("d", type=tarfile.SYMTYPE, linkname=str(outside)), member("d/evil", b"x"))
    with pytest.raises(AtollError):
        try:
            await extract(sent, tmp_path / "target")
        except OSError as error:
            raise GuestFailed("refused") from error
    assert list(outside.iterdir()) == []


async def test_nothing_is_written_through_a_link_that_was_there(tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (target / "d").symlink_to(outside)
    with pytest.raises(InvalidInput, match="isn't a folder"):
        await extract(tar(member("d", type=tarfile.DIRTYPE, mode=0o755), member("d/evil", b"x")), target)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("sent", [b"", b"rubbish" * 300, tar(member("a", b"x" * 5000))[:2000]])
async def test_half_an_archive_leaves_nothing(tmp_path: Path, sent: bytes) -> None:
    with pytest.raises(GuestFailed):
        await extract(sent, tmp_path / "target", kind="file")
    assert list(tmp_path.iterdir()) == []


async def test_devices_are_left_out_and_setuid_is_taken_away(tmp_path: Path) -> None:
    device = member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
    await extract(tar(device, member("tool", b"x", mode=0o4755)), tmp_path / "target")
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["tool"]
    assert (tmp_path / "target" / "tool").stat().st_mode & 0o7777 == 0o755


async def test_a_file_replaces_a_file_but_no_folder(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "folder").mkdir()
    await extract(tar(member("./x", b"new")), tmp_path / "old", kind="file")
    assert (tmp_path / "old").read_text() == "new"
    with pytest.raises(InvalidInput):
        await extract(tar(member("./x", b"new")), tmp_path / "folder", kind="file")
