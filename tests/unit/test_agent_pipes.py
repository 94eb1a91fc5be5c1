"""Slow clients of what reads and writes files take no thread from others."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import BinaryIO

from atoll.agent.pipes import read_while_written, written_while_read
from atoll.images.source import in_thread

MANY = 100
"""More than asyncio has threads, on whatever computer."""


async def _whole(file: BinaryIO) -> bytes:
    return await in_thread(lambda look: file.read())


async def test_many_bodies_that_dont_come_leave_threads_to_others() -> None:
    held = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        await held.wait()
        yield b"b" * 1_000_000

    reading = [asyncio.create_task(written_while_read(slow(), _whole)) for _ in range(MANY)]
    async with asyncio.timeout(30):
        # Each of them is being read.
        for _ in range(10):
            assert await asyncio.to_thread(os.getpid) == os.getpid()
        held.set()
        assert set(await asyncio.gather(*reading)) == {b"a" + b"b" * 1_000_000}


async def test_many_files_that_dont_come_leave_threads_to_others() -> None:
    held = asyncio.Event()

    async def write(file: BinaryIO) -> None:
        file.write(b"a")
        await held.wait()
        await in_thread(lambda look: file.write(b"b" * 50_000))

    async def everything() -> bytes:
        return b"".join([piece async for piece in read_while_written(write)])

    reading = [asyncio.create_task(everything()) for _ in range(MANY)]
    async with asyncio.timeout(30):
        for _ in range(10):
            assert await asyncio.to_thread(os.getpid) == os.getpid()
        held.set()
        assert set(await asyncio.gather(*reading)) == {b"a" + b"b" * 50_000}


async def test_a_reader_that_ends_early_ends_the_writing() -> None:
    written = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal written
        while True:
            written += 1 << 20
            yield bytes(1 << 20)

    async def some(file: BinaryIO) -> int:
        return len(await in_thread(lambda look: file.read(10)))

    async with asyncio.timeout(30):
        assert await written_while_read(endless(), some) == 10
    assert written < 100 << 20
    pieces = read_while_written(lambda file: _endlessly(file))
    async with contextlib.aclosing(pieces):  # type: ignore[type-var]
        assert await anext(pieces)


async def _endlessly(file: BinaryIO) -> None:
    with contextlib.suppress(BrokenPipeError):
        while True:
            await in_thread(lambda look: file.write(bytes(1000)))
