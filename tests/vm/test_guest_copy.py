"""Files into a real guest and back."""

import filecmp
import os
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.helpers.machines import Factory, Machine
from tests.vm.guest_of_a_module import guest_of_a_module

from atoll.errors import InvalidInput, NotFound, StorageFailed
from atoll.model.operation import Progress

pytestmark = [pytest.mark.vm, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm() -> AsyncIterator[Machine]:
    async with guest_of_a_module() as machine:
        yield machine


async def test_a_folder_comes_back_as_it_went(vm: Machine, tmp_path: Path) -> None:
    source = tmp_path / "-a folder\né😀"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "--odd\nname").write_bytes(os.urandom(300_000))
    (source / "sub" / "tool").write_text("#!/bin/sh\n")
    (source / "sub" / "tool").chmod(0o754)
    (source / "link").symlink_to("/etc/nowhere")
    os.utime(source / "sub" / "tool", (10**9, 10**9))

    await vm.copy_to(source, "/tmp")
    await vm.copy_to(source, "/tmp/renamed")
    await vm.copy_from(f"/tmp/{source.name}", tmp_path / "back")
    await vm.copy_from("/tmp/renamed", tmp_path)

    for back in (tmp_path / "back", tmp_path / "renamed"):
        assert sorted(p.relative_to(back) for p in back.rglob("*")) == sorted(
            p.relative_to(source) for p in source.rglob("*")
        )
        assert (back / "--odd\nname").read_bytes() == (source / "--odd\nname").read_bytes()
        assert (back / "sub" / "tool").stat().st_mode == (source / "sub" / "tool").stat().st_mode
        assert (back / "sub" / "tool").stat().st_mtime == 10**9
        assert (back / "link").readlink() == Path("/etc/nowhere")


async def test_a_file_goes_under_a_name_or_into_a_folder(vm: Machine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("1")
    file.chmod(0o640)
    told: list[Progress] = []
    await vm.copy_to(file, "/tmp/as-this", report=told.append)
    await vm.copy_to(file, "/tmp/")
    assert await vm.sh("stat -c %a:%u /tmp/as-this; cat /tmp/file") == "640:0\n1"
    assert (told[-1].done, told[-1].total, told[-1].unit) == (1, 1, "bytes")
    await vm.sh("mkdir -p /tmp/here/file")
    with pytest.raises(InvalidInput, match="folder"):
        await vm.copy_to(file, "/tmp/here")
    await vm.sh("printf 22 >/tmp/file; mkdir -p /tmp/f; mv /tmp/file '/tmp/f/-x'")
    await vm.copy_from("/tmp/f/-x", tmp_path)
    assert (tmp_path / "-x").read_text() == "22"


async def test_what_is_not_there_is_told(vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(NotFound, match="nothing-here"):
        await vm.copy_to(tmp_path / "nothing-here", "/tmp")
    with pytest.raises(NotFound, match="/nothing/here"):
        await vm.copy_from("/nothing/here", tmp_path)
    with pytest.raises(NotFound):
        await vm.copy_to(tmp_path / "file", "/nothing/here")
    with pytest.raises(NotFound):
        await vm.copy_from("/etc/passwd", tmp_path / "no" / "folder")
    with pytest.raises(InvalidInput, match="absolute"):
        await vm.copy_from("etc/passwd", tmp_path)


async def test_a_full_disk_in_the_guest_is_told_and_leaves_nothing(vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(4 << 20))
    await vm.sh("mkdir /tmp/small && mount -t tmpfs -o size=1m none /tmp/small")
    with pytest.raises(StorageFailed, match="full"):
        await vm.copy_to(tmp_path / "big", "/tmp/small/big")
    assert await vm.sh("ls -A /tmp/small; umount /tmp/small") == ""


async def test_the_marks_themselves_can_be_copied(vm: Machine, tmp_path: Path) -> None:
    await vm.copy_from("/run/atoll.0/m", tmp_path / "mark")
    assert (tmp_path / "mark").stat().st_size == 34


@pytest.mark.slow
async def test_a_gigabyte_goes_both_ways_in_little_memory(factory: Factory, tmp_path: Path) -> None:
    vm = await factory.run("tiny", disk_size="4GiB")
    big, back = tmp_path / "big", tmp_path / "back"
    piece = os.urandom(1 << 20)
    with big.open("wb") as file:
        for _ in range(1024):
            file.write(piece)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    await vm.copy_to(big, "/root/big")
    between = time.monotonic()
    await vm.copy_from("/root/big", back)
    print(f"1 GiB in {between - started:.1f} s, out {time.monotonic() - between:.1f} s")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert filecmp.cmp(big, back, shallow=False)
    assert grown < 100 << 10, f"{grown} KiB"
