"""Between functions that want a file, in a thread, and streams of the network: a pipe, so that neither runs ahead.

Our end of it is waited for by the event loop: clients that are slow, and there may be many, take no thread.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import BinaryIO, TypeVar

R = TypeVar("R")
_PIECE = 1 << 18


async def read_while_written(write: Callable[[BinaryIO], Awaitable[None]]) -> AsyncIterator[bytes]:
    """What `write` writes into the file that it is given, as it comes. Raises what it raises."""
    reading, writing = os.pipe()

    async def work() -> None:
        with os.fdopen(writing, "wb", buffering=0) as file:
            await write(file)

    working = asyncio.create_task(work())
    try:
        with os.fdopen(reading, "rb", buffering=0):
            while piece := await _read(reading):
                yield piece
        await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def written_while_read(pieces: AsyncIterator[bytes], read: Callable[[BinaryIO], Awaitable[R]]) -> R:
    """What `read` makes of the pieces, which it finds in the file that it is given."""
    reading, writing = os.pipe()

    async def work() -> None:
        with os.fdopen(writing, "wb", buffering=0):
            async for piece in pieces:
                await _write(writing, piece)

    working = asyncio.create_task(work())
    try:
        with os.fdopen(reading, "rb", buffering=0) as file:
            return await read(file)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def _read(descriptor: int) -> bytes:
    """What there is, when there is something; nothing at the end."""
    loop = asyncio.get_running_loop()
    os.set_blocking(descriptor, False)
    while True:
        try:
            return os.read(descriptor, _PIECE)
        except BlockingIOError:
            await _ready(loop.add_reader, loop.remove_reader, descriptor)


async def _write(descriptor: int, piece: bytes) -> None:
    loop = asyncio.get_running_loop()
    os.set_blocking(descriptor, False)
    rest = memoryview(piece)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            await _ready(loop.add_writer, loop.remove_writer, descriptor)


async def _ready(add: Callable[..., None], remove: Callable[[int], object], descriptor: int) -> None:
    ready = asyncio.Event()
    add(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        remove(descriptor)


async def begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, the first of which is there: what can't be had is told before an answer is begun."""
    first = await anext(pieces, None)

    async def all_of_them() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield first
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # they are generators

    return all_of_them()
