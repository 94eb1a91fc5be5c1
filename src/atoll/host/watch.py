"""Waiting for processes and files without polling: pidfd and inotify."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from asyncinotify import Inotify, Mask, Watch

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


class Watches:
    """Files that exist, watched for what is appended, all through one descriptor: a user has few of that kind."""

    def __init__(self) -> None:
        self._inotify = Inotify(sync_timeout=0)
        self._keys: dict[Watch, str] = {}
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._read)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._inotify.fd)
        self._inotify.close()

    def add(self, path: Path, key: str) -> Watch:
        """Tell changes of the file by this key. Raises `OSError` when there is none."""
        watch = self._inotify.add_watch(path, Mask.MODIFY)
        self._keys[watch] = key
        return watch

    def remove(self, watch: Watch) -> None:
        self._keys.pop(watch, None)
        with contextlib.suppress(OSError):  # The kernel takes it away with the file.
            self._inotify.rm_watch(watch)

    def _read(self) -> None:
        while (event := self._inotify.sync_get()) is not None:
            if event.watch is not None and event.watch in self._keys:
                self._changed.add(self._keys[event.watch])
                self._wake.set()

    def wake(self) -> None:
        """Let `changes` yield, though perhaps nothing has changed."""
        self._wake.set()

    async def changes(self) -> AsyncIterator[set[str]]:
        """The keys of those that have changed since the last ones."""
        while await self._wake.wait():
            self._wake.clear()
            changed, self._changed = self._changed, set()
            yield changed


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
