"""Following what guests and QEMU write, and noticing ends."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from atoll.host.watch import changes, follow, wait_for_exit


async def soon(lines: AsyncIterator[bytes], wanted: bytes) -> None:
    seen = b""
    async with asyncio.timeout(5):
        async for data in lines:
            seen += data
            if wanted in seen:
                return
    raise AssertionError(seen)


async def test_a_log_is_followed_from_before_its_birth_over_cutting_and_replacing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = follow(log)
    first = asyncio.create_task(soon(lines, b"one"))
    await asyncio.sleep(0.05)
    log.write_bytes(b"one")
    await first
    with log.open("ab") as file:
        file.write(b"two")
    await soon(lines, b"two")
    log.write_bytes(b"3")
    await soon(lines, b"3")
    (tmp_path / "new").write_bytes(b"four")
    (tmp_path / "new").replace(log)
    await soon(lines, b"four")


async def test_what_was_written_last_is_read_before_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"a" * 1_000_000)
    over = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(whole(follow(log, offset=10, until=over)))
    await asyncio.sleep(0.05)
    with log.open("ab") as file:
        file.write(b"last")
    over.set_result(None)
    assert await asyncio.wait_for(reading, 5) == b"a" * 999_990 + b"last"


async def whole(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


async def test_the_end_of_a_process_is_an_event() -> None:
    process = subprocess.Popen(["sleep", "0.2"])
    await asyncio.wait_for(wait_for_exit(process.pid), 5)
    process.wait()
    await asyncio.wait_for(wait_for_exit(process.pid), 1)


async def test_files_have_more_followers_than_a_user_has_inotify_descriptors(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    told = []

    async def one(number: int) -> None:
        watched = changes(tmp_path / f"file{number % 2}")
        await anext(watched)
        ready.append(number)
        await anext(watched)
        told.append(number)
        await watched.aclose()

    ready: list[int] = []
    followers = [asyncio.create_task(one(number)) for number in range(400)]
    async with asyncio.timeout(20):
        while len(ready) < 400:
            await asyncio.sleep(0.01)
        assert len(list(Path("/proc/self/fd").iterdir())) < before + 10
        (tmp_path / "other").write_text("nobody follows this")
        (tmp_path / "file0").write_text("1")
        while len(told) < 200:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert {number % 2 for number in told} == {0}
        (tmp_path / "file1").write_text("1")
        await asyncio.gather(*followers)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
