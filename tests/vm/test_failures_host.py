"""The host is odd or ill: where Atoll's home is, what it may write there, files that are gone, clocks that jump.

Each ends with one clear error or works, and nothing is lost.
"""

import asyncio
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.helpers.command import Ended, atoll
from tests.helpers.images import adopt_cached
from tests.helpers.machines import Factory
from tests.helpers.world import disagreements

from atoll.errors import AtollError, StorageFailed
from atoll.layout import Layout
from atoll.model.requests import DiskRequest
from atoll.model.state import Phase

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

PutImage = Callable[[str], Awaitable[str]]


def check_refused(ended: Ended, *words: str) -> None:
    """It failed with a single line, without a traceback, that has these words."""
    assert ended.code not in (0, 130), ended
    assert ended.err.startswith("Error: ") and ended.err.count("\n") == 1, ended.err
    for word in words:
        assert word in ended.err


def under(folder: Path) -> Layout:
    return Layout(data=folder / "data", cache=folder / "cache", run=folder / "run")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("with spaces and 'quotes\"", id="quotes", marks=pytest.mark.slow),
        pytest.param("ünï-🐙", id="emoji", marks=pytest.mark.slow),
        pytest.param("a,b=c:d;e,,file=x", id="punctuation"),
        pytest.param("json:{}%41?x#y\\n", id="looks-like-an-address", marks=pytest.mark.slow),
        pytest.param("/".join(["long" * 12] * 5), id="long", marks=pytest.mark.slow),
    ],
)
async def test_a_home_may_have_any_name(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / name
    folder.mkdir(parents=True)
    monkeypatch.setenv("ATOLL_HOME", str(folder))
    await adopt_cached("tiny", under(folder))
    async with Factory(under(folder)) as factory:
        vm = factory.machine(await factory.host.create("tiny", name="v", memory="96MiB"))
        await vm.start(wait=True, timeout=120)
        await vm.write("/root/file", "kept")
        await vm.snapshot("first")
        await vm.write("/root/file", "lost")
        await vm.disk_add(DiskRequest(name="more", size="1MiB"))
        await vm.restore("first")
        assert await vm.read("/root/file") == "kept"
        (fork,) = await vm.fork(1)
        assert await factory.machine(fork).read("/root/file") == "kept"
        assert await asyncio.to_thread(atoll, "exec", "v", "--", "cat", "/root/file") == Ended(0, "kept", "")
        assert await disagreements(factory.layout) == []


async def test_a_home_that_became_read_only_is_told_and_read(small_home: Path, layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    assert atoll("create", "tiny", "--name", "v", "--memory", "96MiB").code == 0
    subprocess.run(["mount", "-o", "remount,ro", small_home], check=True)
    assert "v" in atoll("ls").out
    assert "tiny" in atoll("image", "ls").out
    for command in (["start", "v"], ["create", "tiny"], ["snapshot", "v"], ["rm", "v"], ["rename", "v", "w"]):
        check_refused(atoll(*command), "ATOLL_HOME")
    subprocess.run(["mount", "-o", "remount,rw", small_home], check=True)
    assert await disagreements(layout) == []
    ran = atoll("start", "v")
    assert (ran.code, ran.err) == (0, "")
    assert atoll("rm", "--force", "v").code == 0


async def test_a_guest_that_fills_the_disk_waits_and_goes_on(small_home: Path, layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    filler = small_home / "filler"
    async with Factory(layout) as factory:
        vm = factory.machine(await factory.host.create("tiny", name="v", memory="96MiB"))
        await vm.start(wait=True, timeout=120)
        room = os.statvfs(small_home)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - (4 << 20)))
        writing = asyncio.create_task(vm.sh("dd if=/dev/urandom of=/root/big bs=1M count=20 2>/dev/null; sync"))
        await vm.reported("BLOCK_IO_ERROR")
        info = await vm.info()
        assert (info.phase, info.trouble) == (Phase.PAUSED, "disk-full")
        assert "disk-full" in atoll("show", "v").out
        filler.unlink()
        await vm.resume()
        await writing
        assert await vm.sh("wc -c < /root/big") == str(20 << 20)
        assert await disagreements(layout) == []


@pytest.mark.parametrize(
    "damage", ["empty", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gone", "other"))]
)
async def test_a_layer_that_is_ill_is_told_and_others_are_not_touched(damage: str, factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    await vm.snapshot("first")
    (other,) = [await factory.create("tiny", name="other", memory="96MiB")]
    layer = next(node.snapshot.layer_ids[0] for node in await vm.history() if node.snapshot.name == "first")
    path = factory.layout.layer(layer)
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"empty": b"", "other": b"not a disk" * 9999}[damage])
    refused = atoll("start", "v")
    check_refused(refused, path.name if damage == "gone" else "root")
    assert await vm.phase() is Phase.STOPPED
    assert atoll("ls").code == 0
    await other.start(wait=True, timeout=120)
    path.unlink(missing_ok=True)
    path.write_bytes(whole)
    await vm.start(wait=True, timeout=120)
    assert await disagreements(factory.layout) == []


async def test_a_kernel_that_is_gone_is_told(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    blob = factory.layout.blob(vm.record.spec.boot.kernel or "")
    kept = blob.with_name("kept")
    blob.rename(kept)
    check_refused(atoll("start", "v"), "is not there")
    kept.rename(blob)
    await vm.start(wait=True, timeout=120)


def newer(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 999")
    database.close()


def corrupt(path: Path) -> None:
    path.write_bytes(b"this was a database" * 1000)


@pytest.mark.parametrize(("damage", "word"), [(newer, "newer Atoll"), (corrupt, "damaged")])
async def test_records_that_cannot_be_used_are_told_by_every_command(
    damage: Callable[[Path], None], word: str, layout: Layout, with_image: PutImage
) -> None:
    await with_image("tiny")
    assert atoll("create", "tiny", "--name", "v").code == 0
    for path in layout.data.glob("atoll.db-*"):
        path.unlink()
    whole = layout.database.read_bytes()
    damage(layout.database)
    ill = layout.database.read_bytes()
    for command in (["ls"], ["run", "tiny"], ["rm", "v"], ["image", "ls"], ["operation", "ls"], ["events"]):
        check_refused(atoll(*command), word, str(layout.database))
    assert layout.database.read_bytes() == ill
    assert "atoll.db" in atoll("doctor").out
    layout.database.write_bytes(whole)
    assert "v" in atoll("ls").out


@pytest.mark.parametrize("years", [-30, pytest.param(30, marks=pytest.mark.slow)])
async def test_the_clock_may_jump(years: int, factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + years * 365.25 * 86400)
    assert await vm.phase() is Phase.RUNNING
    await vm.write("/root/file", "kept")
    await vm.snapshot("jumped")
    monkeypatch.setattr(time, "time", real)
    await vm.snapshot("back")
    assert {node.snapshot.name for node in await vm.history()} >= {"jumped", "back"}
    for words in (["ls"], ["history", "v"], ["show", "v"], ["operation", "ls"], ["events"], ["image", "ls"]):
        shown = atoll(*words)
        assert (shown.code, shown.err) == (0, ""), shown
        assert not re.search(r"-\d[\d.]*\w* ago", shown.out)
    await vm.restore("jumped")
    assert await vm.read("/root/file") == "kept"
    assert await disagreements(factory.layout) == []


ODD = [
    "",
    " ",
    "a b",
    "🐙",
    "../x",
    "/etc",
    "a/b",
    "-x",
    ".hidden",
    "a\nb",
    "a\x1b[31m",
    "x" * 64,
    "ａ",
    "a,b=c",
    "$(id)",
]


@pytest.mark.slow
async def test_odd_names_are_refused_or_work(layout: Layout, with_image: PutImage, tmp_path: Path) -> None:
    await with_image("tiny")
    assert atoll("create", "tiny", "--name", "v", "--memory", "96MiB").code == 0
    for name in ODD:
        for command in (
            ["create", "tiny", f"--name={name}"],
            ["rename", "v", "--", name],
            ["snapshot", "v", "--", name],
            ["clone", "v", "--", name],
            ["image", "tag", "tiny", "--", name.replace("/b", "/B")],
            ["disk", "add", "v", f"--name={name or '/'}", "1MiB"],
        ):
            refused = atoll(*command)
            assert refused.code in (2, 3), (command, refused)
            assert "\x1b" not in refused.err and "Traceback" not in refused.err
        assert atoll("show", "--", name).code in (2, 3)
    assert atoll("ls", "--quiet").out.split() == ["v"]
    assert await disagreements(layout) == []
    for name in ("a", "A-1", "9", "with.dots_and-dashes", "x" * 63, "all", "none", "json", "head"):
        assert atoll("create", "tiny", f"--name={name}", "--memory", "96MiB").code == 0, name
        assert atoll("rm", "--", name).code == 0, name


@pytest.mark.slow
async def test_a_thousand_vms(factory: Factory) -> None:
    for number in range(1000):
        await factory.create("tiny", name=f"vm-{number:04}", memory="96MiB")
    listed = atoll("ls", "--quiet")
    assert (listed.code, len(listed.out.split())) == (0, 1000)
    assert atoll("show", "vm-0999", "--format", "json").code == 0
    check_refused(atoll("show", "vm-099"), "fits 10 VMs")
    await (await factory.host.get("vm-0500")).start(wait=True, timeout=120)
    assert (await asyncio.to_thread(atoll, "exec", "vm-0500", "echo", "here")).out == "here\n"
    assert await disagreements(factory.layout) == []
    for info in await factory.host.ls():
        await (await factory.host.get(info.vm.id)).rm(force=True)
    assert not any(factory.layout.vms.iterdir())


async def test_errors_of_a_full_disk_change_nothing(small_home: Path, layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    async with Factory(layout) as factory:
        await factory.host.create("tiny", name="v", memory="96MiB")
        before = await disagreements(layout)
        room = os.statvfs(small_home)
        with (small_home / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize)
        with pytest.raises(AtollError) as caught:
            await factory.host.create("tiny", name="w", memory="96MiB")
        assert isinstance(caught.value, StorageFailed) or "full" in caught.value.text
        assert [info.vm.name for info in await factory.host.ls()] == ["v"]
        (small_home / "filler").unlink()
        assert await disagreements(layout) == before == []
        await factory.host.create("tiny", name="w", memory="96MiB")
