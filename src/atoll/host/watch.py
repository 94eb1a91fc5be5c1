"""Waiting for processes and files without polling: pidfd and inotify."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import ClassVar

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


async def changes(*paths: Path) -> AsyncIterator[None]:
    """Yields once at first and then after each change of these files, which needn't exist yet.

    The first yield comes when the watch stands, so what is looked at then and later can't be missed.
    """
    changed = asyncio.Event()
    with contextlib.ExitStack() as stack:
        for path in paths:
            make_folder(path.parent)
            stack.enter_context(_Folders.of_this_loop().listening(path, changed))
        yield
        while await changed.wait():
            changed.clear()
            yield


class _Folders:
    """All files that an event loop follows by name, through one descriptor: a user has 128 of that kind as a rule
    (`fs.inotify.max_user_instances` in inotify(7)), and an agent has many followers.
    """

    _of: ClassVar[dict[asyncio.AbstractEventLoop, "_Folders"]] = {}

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._inotify = Inotify(sync_timeout=0)
        self._listeners: dict[int, dict[asyncio.Event, str]] = {}
        """By the folder's watch: whom to tell of which name."""
        # The library's own waiting logs an error when it is cancelled just as something comes.
        loop.add_reader(self._inotify.fd, self._read)

    @classmethod
    def of_this_loop(cls) -> "_Folders":
        loop = asyncio.get_running_loop()
        if loop not in cls._of:
            cls._of[loop] = cls(loop)
        return cls._of[loop]

    @contextlib.contextmanager
    def listening(self, path: Path, changed: asyncio.Event) -> Iterator[None]:
        """Set `changed` at each change of the file. Its folder is watched, so one that is replaced is seen too."""
        watch = self._inotify.add_watch(path.parent, _CHANGES)
        self._listeners.setdefault(watch.wd, {})[changed] = path.name
        try:
            yield
        finally:
            del self._listeners[watch.wd][changed]
            if not self._listeners[watch.wd]:
                del self._listeners[watch.wd]
                with contextlib.suppress(OSError):  # The kernel takes it away with the folder.
                    self._inotify.rm_watch(watch)
            if not self._listeners:
                self._close()

    def _close(self) -> None:
        del self._of[self._loop]
        self._loop.remove_reader(self._inotify.fd)
        self._inotify.close()

    def _read(self) -> None:
        while (event := self._inotify.sync_get()) is not None:
            # Without a watch it is the news that some were lost.
            told = [self._listeners.get(event.watch.wd, {})] if event.watch is not None else self._listeners.values()
            for listeners in told:
                for changed, name in listeners.items():
                    if event.name is None or str(event.name) == name:
                        changed.set()


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
