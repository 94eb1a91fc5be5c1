"""The audit log: JSON lines that are only appended to, in files of a size, the older ones numbered."""

import asyncio
import heapq
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from atoll.errors import from_os_error
from atoll.host import files
from atoll.host.watch import changes
from atoll.model.audit import AuditEntry

LARGEST = 8 << 20
"""Bytes of one file."""
KEPT = 8
"""How many older ones are kept."""
_decoder = msgspec.json.Decoder(AuditEntry)


class AuditLog:
    """What one agent writes."""

    def __init__(self, path: Path, *, largest: int = LARGEST) -> None:
        self._path = path
        self._largest = largest
        self._file: int | None = None

    def add(self, entry: AuditEntry) -> None:
        """Raises `StorageFailed`."""
        line = msgspec.json.encode(entry) + b"\n"
        try:
            file = self._opened()
            if os.fstat(file).st_size + len(line) > self._largest:
                self.close()
                _rotate(self._path)
                file = self._opened()
            os.write(file, line)
        except OSError as error:
            raise from_os_error(error, f"write {self._path}") from error

    def _opened(self) -> int:
        if self._file is None:
            files.make_folder(self._path.parent)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o600)
        return self._file

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _rotate(path: Path) -> None:
    for number in range(KEPT, 0, -1):
        if (newer := _numbered(path, number - 1)).exists():
            newer.replace(_numbered(path, number))


def past(*paths: Path, tail: int | None = None) -> list[AuditEntry]:
    """What is written down in these logs, oldest first; only the last `tail`. Raises `StorageFailed`."""
    every = heapq.merge(*map(_log, paths), key=lambda entry: entry.at)
    return list(every if tail is None else deque(every, maxlen=tail))


def _log(path: Path) -> Iterator[AuditEntry]:
    for number in range(KEPT, -1, -1):
        yield from _read(_numbered(path, number))


def _read(path: Path) -> Iterator[AuditEntry]:
    try:
        with path.open("rb") as file:
            yield from _entries(file.readlines())
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error


def _entries(lines: list[bytes]) -> Iterator[AuditEntry]:
    """What is on the lines; a line that a power cut has cut off is left out."""
    for line in lines:
        try:
            yield _decoder.decode(line)
        except msgspec.DecodeError:
            continue


async def entries(*paths: Path, follow: bool = False, tail: int | None = None) -> AsyncIterator[AuditEntry]:
    """As `past`, and with `follow` what is written from now on."""
    ends = {path: _end_of(path) for path in paths}
    for entry in await asyncio.to_thread(past, *paths, tail=tail):
        yield entry
    if not follow:
        return
    async for _ in changes(*paths):
        fresh: list[bytes] = []
        for path, (end, number) in ends.items():
            lines, end_now, number_now = _lines_after(path, end, number)
            ends[path] = end_now, number_now
            fresh += lines
        for entry in sorted(_entries(fresh), key=lambda entry: entry.at):
            yield entry


def _end_of(path: Path) -> tuple[int, int]:
    """How long the newest file is, and which it is."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_ino


def _lines_after(path: Path, end: int, number: int) -> tuple[list[bytes], int, int]:
    """The whole lines after `end`, also when the file has got another name meanwhile."""
    size, newest = _end_of(path)
    if (size, newest) == (end, number):
        return [], end, number
    rest: list[bytes] = []
    if number and newest != number:
        rest = _whole_lines(_numbered(path, 1), end)
        end = 0
    lines = _whole_lines(path, end)
    return rest + lines, end + sum(map(len, lines)), newest


def _whole_lines(path: Path, start: int) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return [line for line in file.readlines() if line.endswith(b"\n")]
    except FileNotFoundError:
        return []
