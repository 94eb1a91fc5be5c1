"""Decompress a downloaded image, with an end to it: a few kilobytes of xz can hold terabytes."""

import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from atoll.errors import from_os_error
from atoll.host.files import CHUNK
from atoll.images.formats import MAX_VIRTUAL_SIZE
from atoll.images.made import Report
from atoll.images.source import DAMAGED, SourceFile, in_thread, progress_teller, write_at
from atoll.model.units import MIB, format_size

XZ_MAGIC = b"\xfd7zXZ\x00"
MEMORY = 256 * MIB
"""Bytes that the decompressor may take; `xz -9` needs 65 MiB."""
MAX_RATIO, BASE_SIZE = 1000, 64 * MIB
"""A disk that is mostly empty shrinks a lot, yet not without end."""


def is_xz(source: SourceFile) -> bool:
    return source.peek(0, len(XZ_MAGIC)) == XZ_MAGIC


async def unxz(source: SourceFile, *, target: Path, report: Report) -> None:
    """Write the content of an xz file to `target`, a new sparse file.

    Raises `ImageRefused` for a damaged file or one that grows beyond measure, `StorageFailed` when the disk is full.
    """
    tell = progress_teller(report, step="decompress", total=source.size)

    def work(look: Callable[[], None]) -> None:
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, _decompress(source, descriptor, look=look, tell=tell))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise from_os_error(error, f"write {target}") from error
        except (lzma.LZMAError, EOFError) as error:
            raise source.refused(f"it can't be decompressed ({error})", DAMAGED) from error

    await in_thread(work)


def _decompress(source: SourceFile, target: int, *, look: Callable[[], None], tell: Callable[[int], None]) -> int:
    """The number of bytes that came out."""
    limit = min(source.size * MAX_RATIO + BASE_SIZE, MAX_VIRTUAL_SIZE)
    written = 0
    for chunk in _chunks(source, look=look, tell=tell):
        if chunk.strip(b"\0"):
            write_at(target, chunk, written)
        written += len(chunk)
        if written > limit:
            raise source.refused(f"it grows beyond {format_size(limit)} when it is decompressed")
    return written


def _chunks(source: SourceFile, *, look: Callable[[], None], tell: Callable[[int], None]) -> Iterator[bytes]:
    """The content of all streams: an xz file may have several, with zeros between and after them."""
    read, rest = 0, b""
    while rest or read < source.size:
        decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MEMORY)
        while not decompressor.eof:
            look()
            if decompressor.needs_input and not rest:
                if read == source.size:
                    raise EOFError("its end is missing")
                rest = source.read(read, min(CHUNK, source.size - read))
                read += len(rest)
                tell(read)
            yield decompressor.decompress(rest, max_length=CHUNK)
            rest = b""
        rest = decompressor.unused_data.lstrip(b"\0")
        while not rest and read < source.size:
            rest = source.read(read, min(CHUNK, source.size - read))
            read += len(rest)
            rest = rest.lstrip(b"\0")
