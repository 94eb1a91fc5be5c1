"""Writing a bundle. All its files are open before it begins: what is removed meanwhile can still be read."""

import contextlib
import hashlib
import os
import select
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from atoll.errors import StorageFailed
from atoll.host.files import CHUNK
from atoll.model.bundle import BundledMemory, Manifest
from atoll.operations.bundle_format import PART, Member, end, head, header, members, padding
from atoll.qemu import mapped_ram

Look = Callable[[], None]
"""Raises once the caller has been cancelled."""
PATIENCE = 200
"""Milliseconds between two looks while a pipe isn't ready."""


@dataclass(frozen=True)
class Opened:
    """A file of the bundle: the parts of it that are stored (start, end), each with a head in the case of memory."""

    descriptor: int
    parts: tuple[tuple[int, int], ...]
    sparse: bool = False

    def chunks(self, look: Look) -> Iterator[bytes]:
        for start, stop in self.parts:
            if self.sparse:
                yield PART.pack(start, stop - start)
            while start < stop:
                look()
                chunk = os.pread(self.descriptor, min(CHUNK, stop - start), start)
                if not chunk:
                    return
                yield chunk
                start += len(chunk)


def plain(descriptor: int) -> Opened:
    return Opened(descriptor, ((0, os.fstat(descriptor).st_size),))


def memory(descriptor: int, look: Look) -> tuple[Opened, BundledMemory]:
    """The memory without its holes; all of it is read."""
    size = os.fstat(descriptor).st_size
    opened = Opened(descriptor, tuple(mapped_ram.data(descriptor, 0, size)), sparse=True)
    digest, stored = hashlib.sha256(), 0
    for chunk in opened.chunks(look):
        digest.update(chunk)
        stored += len(chunk)
    return opened, BundledMemory(size=size, stored=stored, sha256=digest.hexdigest())


class Sink:
    """A descriptor to write to: a file, or a pipe whose reader may take its time."""

    def __init__(self, descriptor: int, look: Look) -> None:
        self._descriptor, self._look = descriptor, look
        self._waits = not stat.S_ISREG(os.fstat(descriptor).st_mode)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            piece = view
            if self._waits:
                # A pipe that is ready takes so much without waiting.
                self._wait()
                piece = view[: select.PIPE_BUF]
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._descriptor, piece) :]

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        self._look()
        while not poll.poll(PATIENCE):
            self._look()


def write(
    descriptor: int, manifest: Manifest, opened: dict[str, Opened], *, look: Look, tell: Callable[[int], None]
) -> None:
    """Write all of it; `opened` has the members by their names. Raises `OSError`, `StorageFailed` for damaged files."""
    sink, done = Sink(descriptor, look), 0
    sink.write(head(manifest))
    for member in members(manifest):
        sink.write(header(member.name, member.size))
        digest, size = hashlib.sha256(), 0
        for chunk in opened[member.name].chunks(look):
            digest.update(chunk)
            sink.write(chunk)
            size, done = size + len(chunk), done + len(chunk)
            tell(done)
        if (size, digest.hexdigest()) != (member.size, member.sha256):
            raise _damaged(member)
        sink.write(padding(member.size))
    sink.write(end())


def _damaged(member: Member) -> StorageFailed:
    return StorageFailed(
        f"can't export {member.name}",
        "the file isn't any more what it was when its checksum was taken",
        "The disk that has it may be failing: see `atoll doctor`, and the system's log.",
    )
