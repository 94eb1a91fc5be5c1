"""Tar streams on the host's side of a copy."""

import asyncio
import os
import shutil
import stat
import tarfile
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import IO, cast

from atoll.errors import GuestFailed, InvalidInput, StorageFailed, from_os_error
from atoll.model.operation import Progress

CHUNK = 256 << 10
WAITING = 8 << 20
"""Bytes that may wait to be written on the host; past them, the guest waits."""

_KINDS = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}


def total_size(source: Path) -> int:
    """Bytes in a file, or in all files of a folder. Raises `OSError`."""
    return sum(status.st_size for _, status in _walk(source) if stat.S_ISREG(status.st_mode))


def _walk(source: Path) -> Iterator[tuple[Path, os.stat_result]]:
    status = source.lstat()
    yield source, status
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(entry.name for entry in source.iterdir()):
            yield from _walk(source / name)


async def archive(source: Path) -> AsyncIterator[bytes]:
    """A tar of `source`: a folder's content under `.`, or a single file under the name `x`. Raises `StorageFailed`.

    In GNU's format: busybox's tar reads no other one with long names, and it takes any bytes for a name.
    """
    folder = source.is_dir() and not source.is_symlink()
    try:
        for path, status in _walk(source):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode))
            if kind is None:
                continue
            info = tarfile.TarInfo("./" + str(path.relative_to(source)) if folder else "x")
            info.type, info.mode, info.mtime = kind, stat.S_IMODE(status.st_mode), int(status.st_mtime)
            if kind == tarfile.SYMTYPE:
                info.linkname = str(path.readlink())
            if kind == tarfile.REGTYPE:
                info.size = status.st_size
            yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            if kind == tarfile.REGTYPE:
                async for data in _content(path, status.st_size):
                    yield data
    except OSError as error:
        raise from_os_error(error, f"read {source}") from error
    yield bytes(2 * tarfile.BLOCKSIZE)


async def _content(path: Path, size: int) -> AsyncIterator[bytes]:
    """Exactly `size` bytes, filled up to whole blocks."""
    left = size
    # A file that became a FIFO in between mustn't make us wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        while left:
            data = file.read(min(CHUNK, left))
            if not data:
                raise StorageFailed(f"{path} became shorter while it was copied", next_step="Copy it again.")
            left -= len(data)
            yield data
    yield bytes(-size % tarfile.BLOCKSIZE)


class Extraction:
    """Takes what the guest sends (a line, then a tar) and makes files of it, in a thread.

    All of it goes into a new folder beside the target, and links are made last: so nothing that the guest sends can
    lead a path out of that folder. At the end it is moved to where it belongs.
    """

    def __init__(self, target: Path, *, report: Callable[[Progress], None] | None) -> None:
        self._target = target
        self._report = report
        self._pipe = _Pipe()
        self._links: list[tarfile.TarInfo] = []
        self._folders: list[tuple[str, int, float]] = []
        self._failure: Exception | None = None
        self._kind = ""
        self._folder: Path | None = None
        self._head = b""
        self._done, self._total = 0, 0
        self._thread = threading.Thread(target=self._extract, daemon=True)

    def feed(self, data: bytes) -> None:
        """Take the next bytes; `drain` should follow."""
        if self._failure:
            raise self._failure
        if not self._kind:
            self._head += data
            line, found, data = self._head.partition(b"\n")
            if not found:
                return
            kind, _, size = line.decode().partition(" ")
            self._kind, self._total = kind, int(size)
            self._thread.start()
        self._pipe.write(data)
        self._done += len(data)
        if self._report:
            self._report(Progress(step="copy", done=min(self._done, self._total), total=self._total, unit="bytes"))

    async def drain(self) -> None:
        """Wait until not too much waits to be written."""
        if self._pipe.full:
            await asyncio.to_thread(self._pipe.wait_for_room)

    async def finish(self) -> None:
        """The guest has sent all: write the rest and move it to the target. Raises `OSError` and our errors."""
        if not self._kind:
            raise GuestFailed("the guest sent nothing")
        self._pipe.end()
        await asyncio.to_thread(self._thread.join)
        self.raise_failure()
        assert self._folder is not None
        await asyncio.to_thread(self._move)

    def raise_failure(self) -> None:
        """Raise what the thread has met, if anything."""
        if isinstance(self._failure, OSError):
            raise from_os_error(self._failure, f"write {self._target}") from self._failure
        if self._failure:
            raise self._failure

    async def close(self) -> None:
        """Stop, and leave nothing unfinished behind."""
        self._pipe.abandon()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def _extract(self) -> None:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=".atoll-", dir=self._target.parent))
            root = self._folder / "x"
            root.mkdir()
            stream = cast(IO[bytes], self._pipe)
            with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK, errors="surrogateescape") as tar:
                for member in tar:
                    self._make(root, tar, member)
            for link in self._links:
                path = _place(root, link)
                path.unlink(missing_ok=True)
                path.symlink_to(link.linkname)
                os.utime(path, (link.mtime, link.mtime), follow_symlinks=False)
            # What follows the end of the archive is read too, so that the guest's tar isn't blocked.
            while self._pipe.read(CHUNK):
                pass
        except tarfile.TarError as error:
            self._fail(GuestFailed("the guest sent something that isn't a tar archive", str(error)))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._pipe.abandon()

    def _make(self, root: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        # A long archive would otherwise keep all its members in memory.
        tar.members = []  # type: ignore[attr-defined]
        path = _place(root, member)
        mode = member.mode & 0o777
        if member.issym():
            self._links.append(member)
        elif member.isdir():
            # It must stay open to us until all is in it and in its place.
            path.mkdir(mode=0o700, exist_ok=True)
            self._folders.append((member.name, mode, member.mtime))
        elif member.islnk():
            os.link(_place(root, member, member.linkname), path, follow_symlinks=False)
        elif member.isreg() and (content := tar.extractfile(member)) is not None:
            path.unlink(missing_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(content, file, CHUNK)
                os.fchmod(file.fileno(), mode)
            os.utime(path, (member.mtime, member.mtime))

    def _move(self) -> None:
        assert self._folder is not None
        root = self._folder / "x"
        if self._kind == "folder":
            _merge(root, self._target)
            for name, mode, mtime in reversed(self._folders):
                (self._target / name).chmod(mode)
                os.utime(self._target / name, (mtime, mtime))
            return
        found = list(root.iterdir())
        if len(found) != 1:
            raise GuestFailed("the guest sent no file", "sockets and devices can't be copied")
        if self._target.is_dir() and not self._target.is_symlink():
            raise InvalidInput(f"{self._target} is a folder", "a file can't take its place")
        found[0].replace(self._target)


def _place(root: Path, member: tarfile.TarInfo, name: str | None = None) -> Path:
    """Where a member goes, its parents made. Raises `GuestFailed` for a name that leads elsewhere."""
    name = member.name if name is None else name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise GuestFailed("the guest sent a file that would land elsewhere", repr(name), "Nothing was written.")
    path = root.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _merge(source: Path, target: Path) -> None:
    """Move a folder to `target`, into the one that is there already. Raises `InvalidInput`, `OSError`."""
    if not os.path.lexists(target):
        source.rename(target)
        return
    if target.is_symlink() or not target.is_dir():
        raise InvalidInput(f"{target} isn't a folder", "a folder can't take its place")
    for entry in list(source.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            _merge(entry, target / entry.name)
            continue
        if (target / entry.name).is_dir() and not (target / entry.name).is_symlink():
            raise InvalidInput(f"{target / entry.name} is a folder", "a file can't take its place")
        entry.replace(target / entry.name)


class _Pipe:
    """Bytes from the event loop to a thread."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._ended = self._abandoned = False
        self._changed = threading.Condition()

    @property
    def full(self) -> bool:
        return self._size > WAITING and not self._abandoned

    def write(self, data: bytes) -> None:
        with self._changed:
            if data and not self._abandoned:
                self._chunks.append(data)
                self._size += len(data)
                self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abandon(self) -> None:
        with self._changed:
            self._ended = self._abandoned = True
            self._chunks.clear()
            self._size = 0
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.full)

    def read(self, count: int) -> bytes:
        """Up to `count` bytes, none at the end: what `tarfile` asks of a stream."""
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._ended)
            if not self._chunks:
                return b""
            data = self._chunks.popleft()
            if len(data) > count:
                self._chunks.appendleft(data[count:])
                data = data[:count]
            self._size -= len(data)
            self._changed.notify_all()
            return data
