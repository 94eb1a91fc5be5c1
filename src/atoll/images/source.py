"""The file that an image is made from: opened once, read by position, and proved unchanged at the end.

Everything that looks into a foreign file does it through `SourceFile`, whose reads are bounded by the file's size, so a
header that lies about its offsets ends in `ImageRefused` and never in a crash or a huge allocation.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from atoll.errors import ImageRefused, StorageFailed, from_os_error
from atoll.host.files import CHUNK
from atoll.images.made import Report
from atoll.model.operation import Progress

Result = TypeVar("Result")
REPORT_EVERY = 16 << 20
"""Bytes between two reports of progress."""


class Stopped(Exception):
    """The task that waits for a thread was cancelled; the thread leaves at its next look."""


class CopyFailed(StorageFailed):
    """The copy can't be written; its source could be read so far. The `OSError` is its cause."""


@dataclass(frozen=True)
class SourceFile:
    """An open regular file. `name` is for people: it has no control characters."""

    descriptor: int
    name: str
    size: int
    identity: tuple[int, ...]

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises `ImageRefused` when the file ends before, `StorageFailed` on a bad disk."""
        if offset < 0 or offset + length > self.size:
            raise self.refused(f"its headers point behind its end ({offset + length} of {self.size} bytes)", DAMAGED)
        data = self.peek(offset, length)
        if len(data) < length:
            raise self.refused("it became shorter while it was read", "Wait until nothing writes to it any more.")
        return data

    def peek(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes, fewer at the end of the file and none outside it."""
        if not 0 <= offset < self.size:
            return b""
        try:
            return os.pread(self.descriptor, length, offset)
        except OSError as error:
            raise from_os_error(error, f"read {self.name}") from error

    def unpack(self, layout: str, offset: int) -> tuple[Any, ...]:
        """The fields of `struct` layout at `offset`."""
        return struct.unpack(layout, self.read(offset, struct.calcsize(layout)))

    def check_table(self, what: str, *, offset: int, length: int) -> None:
        """Refuse when a table doesn't lie inside the file: a size that is a lie could cost memory without end."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.refused(f"its {what} lies behind its end", DAMAGED)

    def refused(self, why: str, next_step: str = "") -> ImageRefused:
        return ImageRefused(f"{self.name} can't be used as an image", why, next_step)

    def check_unchanged(self) -> None:
        """Raises `ImageRefused` if anybody wrote to the file since it was opened; the change time can't be forged."""
        if _identity(os.fstat(self.descriptor)) != self.identity:
            raise self.refused("it was changed while it was read", "Wait until nothing writes to it any more.")


DAMAGED = "The file is damaged or incomplete: copy or download it again."


def shown(path: Path | str) -> str:
    """A path as it can be printed: odd bytes and control characters are escaped."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO)


@contextlib.contextmanager
def opened(path: Path, *, called: str | None = None) -> Iterator[SourceFile]:
    """Open a regular file for reading, without ever waiting (a pipe would). Errors name it as it is `called`.

    Raises `ImageRefused` for what isn't there, isn't a regular file or is empty, `StorageFailed` when it can't be read.
    """
    name = shown(called or path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        # A null character in a name is a ValueError; a socket is ENXIO.
        failure = error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))
        if failure.errno in _NO_FILE:
            raise ImageRefused(
                f"can't read {name}", failure.strerror or str(error), "Give the path of an image file."
            ) from error
        raise from_os_error(OSError(failure.errno, failure.strerror), f"read {name}") from error
    try:
        status = os.fstat(descriptor)
        source = SourceFile(descriptor, name, status.st_size, _identity(status))
        if not stat.S_ISREG(status.st_mode):
            raise source.refused(f"it is {_kind(status.st_mode)}, not a file", "Give the path of an image file.")
        if status.st_size == 0:
            raise source.refused("it is empty", DAMAGED)
        yield source
    finally:
        os.close(descriptor)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device"


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


async def in_thread(work: Callable[[Callable[[], None]], Result]) -> Result:
    """Run blocking `work` in a thread of its own, since it may wait for somebody: those that asyncio has are few, and
    others need them. It gets a function to call often, which raises once the caller is cancelled.
    """
    stop = threading.Event()

    def look() -> None:
        if stop.is_set():
            raise Stopped

    own = ThreadPoolExecutor(1)
    thread = asyncio.get_running_loop().run_in_executor(own, copy_context().run, work, look)
    own.shutdown(wait=False)
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        stop.set()
        # The thread uses the caller's file descriptors: it has to be gone before they are closed.
        await asyncio.wait([thread])
        if not thread.cancelled():
            thread.exception()
        raise


def progress_teller(report: Report, *, step: str, total: int) -> Callable[[int], None]:
    """A function for a thread that reports so many bytes done, on the event loop that runs now, and not too often."""
    loop = asyncio.get_running_loop()
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if done - told >= REPORT_EVERY or done == total:
            told = done
            loop.call_soon_threadsafe(report, Progress(step=step, done=done, total=total, unit="bytes"))

    return tell


async def digest(
    source: SourceFile, *, report: Report, step: str = "read", algorithm: str = "sha256", copy_to: Path | None = None
) -> str:
    """The digest of the whole file in hexadecimal, and on the way a sparse copy of it at `copy_to`.

    Raises `CopyFailed` when the copy can't be written, `StorageFailed` when the file can't be read, `ImageRefused` when
    it ends early.
    """
    tell = progress_teller(report, step=step, total=source.size)

    def work(look: Callable[[], None]) -> str:
        if copy_to is None:
            return _consume(source, algorithm, look=look, tell=tell, target=None)
        try:
            target = os.open(copy_to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                result = _consume(source, algorithm, look=look, tell=tell, target=target)
                os.ftruncate(target, source.size)
                return result
            finally:
                os.close(target)
        except OSError as error:
            told = from_os_error(error, f"write {copy_to}")
            raise CopyFailed(told.what, told.why, told.next_step) from error

    return await in_thread(work)


def _consume(
    source: SourceFile, algorithm: str, *, look: Callable[[], None], tell: Callable[[int], None], target: int | None
) -> str:
    hasher = hashlib.new(algorithm)
    zeros = bytes(CHUNK)
    offset = 0
    while offset < source.size:
        look()
        chunk = source.read(offset, min(CHUNK, source.size - offset))
        hasher.update(chunk)
        if target is not None and chunk != zeros[: len(chunk)]:
            write_at(target, chunk, offset)
        offset += len(chunk)
        tell(offset)
    return hasher.hexdigest()


def write_at(target: int, chunk: bytes, offset: int) -> None:
    """Write the whole chunk, also where one call takes only a piece. Raises `OSError`."""
    view = memoryview(chunk)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written
