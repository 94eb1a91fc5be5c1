"""Waiting for processes and files without polling: pidfd and inotify."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from asyncinotify import Inotify, Mask

from atoll.host.files import make_folder

_BLOCK = 256 * 1024
_CHANGES = Mask.MODIFY | Mask.CREATE | Mask.MOVED_TO | Mask.CLOSE_WRITE


async def wait_for_exit(pid: int) -> None:
    """Until the process has ended (a zombie has). Returns at once when there is none."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    try:
        # A pidfd becomes readable when its process ends: pidfd_open(2).
        loop.add_reader(descriptor, gone.set)
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def changes(path: Path) -> AsyncIterator[None]:
    """Yields once at first and then after each change of the file, which needn't exist yet.

    The first yield comes when the watch stands, so what is looked at then and later can't be missed.
    """
    make_folder(path.parent)
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    with Inotify(sync_timeout=0) as inotify:
        # The folder is watched, so that a file that is replaced is seen too.
        inotify.add_watch(path.parent, _CHANGES)
        # The library's own waiting logs an error when it is cancelled just as something comes.
        loop.add_reader(inotify.fd, readable.set)
        try:
            yield
            while await readable.wait():
                readable.clear()
                while (event := inotify.sync_get()) is not None:
                    if event.name is None or str(event.name) == path.name:
                        yield
        finally:
            loop.remove_reader(inotify.fd)


async def follow(path: Path, *, offset: int = 0, until: "asyncio.Future[None] | None" = None) -> AsyncIterator[bytes]:
    """The file's bytes from `offset` on, and what is appended; a file that is replaced or cut is read from its start.

    Ends when `until` is done and everything was read.
    """
    changed = asyncio.Event()
    watch = asyncio.ensure_future(_signal(path, changed))
    watch.add_done_callback(lambda _: changed.set())
    if until is not None:
        until.add_done_callback(lambda _: changed.set())
    inode = None
    try:
        while True:
            last_look = until is not None and until.done()
            changed.clear()
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                status = os.fstat(file.fileno())
                if inode not in (None, status.st_ino) or status.st_size < offset:
                    offset = 0
                inode = status.st_ino
                file.seek(offset)
                while chunk := file.read(_BLOCK):
                    offset += len(chunk)
                    yield chunk
            if last_look:
                return
            if watch.done():
                watch.result()
            await changed.wait()
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


async def _signal(path: Path, changed: asyncio.Event) -> None:
    async for _ in changes(path):
        changed.set()
