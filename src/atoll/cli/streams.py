"""Standard input as the event loop likes it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator

_PIECE = 1 << 16


async def standard_input() -> AsyncIterator[bytes]:
    """What comes on standard input, piece by piece, to its end.

    The descriptor stays in blocking mode: it is shared with the shell that started us, and with our own output when
    all three are one terminal. So it is read only in the callback that says that it can be, once each time.
    """
    descriptor = sys.stdin.fileno()
    loop = asyncio.get_running_loop()
    while True:
        arrived: asyncio.Future[bytes] = loop.create_future()
        try:
            loop.add_reader(descriptor, _take, descriptor, arrived)
        except PermissionError:
            # epoll refuses files, whose reads don't block for long.
            arrived.set_result(await asyncio.to_thread(os.read, descriptor, _PIECE))
        try:
            piece = await arrived
        finally:
            loop.remove_reader(descriptor)
        if not piece:
            return
        yield piece


def _take(descriptor: int, arrived: asyncio.Future[bytes]) -> None:
    if arrived.done():
        return
    try:
        arrived.set_result(os.read(descriptor, _PIECE))
    except BlockingIOError:
        return
    except OSError:
        # The terminal was hung up (EIO).
        arrived.set_result(b"")
