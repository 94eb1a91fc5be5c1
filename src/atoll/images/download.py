"""Fetch a file over HTTP so that nothing that came is fetched twice, and nothing wrong is kept.

What came is in `{key}.part`, with the server's validators beside it in `{key}.json`; a cancelled or killed download
goes on from there. `{key}.lock` (flock) keeps two processes from writing the same file.
"""

import asyncio
import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec

from atoll.errors import DownloadFailed, ImageRefused, InvalidInput, from_os_error
from atoll.host.files import make_folder, write_atomically
from atoll.host.lease import lease
from atoll.images.addresses import is_http, public
from atoll.images.checksums import Checksum
from atoll.images.formats import MAX_VIRTUAL_SIZE
from atoll.images.made import Report
from atoll.images.source import digest, opened, write_at
from atoll.model.operation import Progress
from atoll.model.units import MIB, format_size

HEADROOM = 64 * MIB
"""Bytes that are left free on the disk."""
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server. All times in seconds."""

    connect: float = 15
    stall: float = 30
    """Without a single byte. There is no limit for the whole: a slow line is no error."""
    attempts: int = 6
    """In a row that bring less than `progress` bytes more than ever before."""
    progress: int = MIB
    first_pause: float = 0.5
    longest_pause: float = 30


PATIENT = Patience()


class Validators(msgspec.Struct, frozen=True, kw_only=True):
    """What the server said about the file that a part belongs to."""

    etag: str = ""
    modified: str = ""
    total: int | None = None

    @property
    def for_range(self) -> str:
        """A value for If-Range, which takes no weak ETag (RFC 9110, 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


def is_complete(path: Path) -> bool:
    """Whether the part at `path` is the whole file, as far as the server told its size."""
    part = _Part(path)
    part.load()
    return part.complete


class _TryAgain(Exception):
    """An attempt that failed, but the next one may not. `pause`: the server asked to wait so many seconds."""

    def __init__(self, why: str, pause: float = 0) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass
class _Part:
    """The file as far as it has come."""

    path: Path
    validators: Validators = field(default_factory=Validators)
    size: int = 0

    def load(self) -> None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self.validators = msgspec.json.decode(self.path.with_suffix(".json").read_bytes(), type=Validators)
            self.size = self.path.stat().st_size

    @property
    def complete(self) -> bool:
        return self.validators.total is not None and self.size == self.validators.total

    def begin(self, validators: Validators) -> None:
        """Start over with an empty file."""
        self.path.unlink(missing_ok=True)
        self.size, self.validators = 0, validators
        write_atomically(self.path.with_suffix(".json"), msgspec.json.encode(validators))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".json").unlink(missing_ok=True)
        self.size, self.validators = 0, Validators()


@contextlib.asynccontextmanager
async def downloaded(
    url: str,
    *,
    into: Path,
    checksum: Checksum | None,
    report: Report,
    limit: int = MAX_VIRTUAL_SIZE,
    patience: Patience = PATIENT,
) -> AsyncIterator[Path]:
    """The whole file at `url`, verified; it is this process's alone inside the `async with`, and removed after it.

    When the body fails for a reason outside the file, or is cancelled, the file stays and the next call has it at once.
    `limit` is in bytes. Raises `InvalidInput` for an address that isn't HTTP, `DownloadFailed` when it doesn't come
    whole or with the right checksum (it is removed then), `StorageFailed` when the disk is full.
    """
    if not is_http(url):
        raise InvalidInput(f"{url!r} can't be downloaded", "it is no http:// or https:// address")
    key = hashlib.sha256(url.encode()).hexdigest()[:32]
    make_folder(into)
    async with lease(into / f"{key}.lock", what=public(url), timeout=math.inf):
        part = _Part(into / f"{key}.part")
        part.load()
        try:
            await _complete(url, part, checksum=checksum, report=report, limit=limit, patience=patience)
        except OSError as error:
            raise from_os_error(error, f"store the download of {public(url)}") from error
        try:
            yield part.path
        except ImageRefused:
            part.remove()
            raise
        part.remove()


async def _complete(
    url: str, part: _Part, *, checksum: Checksum | None, report: Report, limit: int, patience: Patience
) -> None:
    if checksum and part.complete and await _digest(part, checksum, report) == checksum.digest:
        return
    timeout = httpx.Timeout(patience.stall, connect=patience.connect)
    headers = {"Accept-Encoding": "identity", "User-Agent": "atoll"}
    async with httpx.AsyncClient(follow_redirects=True, timeout=timeout, headers=headers) as client:
        await _persist(client, url, part, checksum=checksum, report=report, limit=limit, patience=patience)
    if checksum and (came := await _digest(part, checksum, report)) != checksum.digest:
        part.remove()
        raise DownloadFailed(
            f"{public(url)} has the wrong checksum",
            f"{checksum.algorithm}:{came} came instead of {checksum}",
            "Nothing was kept. The file was changed on its way or by its publisher: check the address and try again.",
        )


async def _digest(part: _Part, checksum: Checksum, report: Report) -> str:
    with opened(part.path) as source:
        return await digest(source, report=report, step="verify", algorithm=checksum.algorithm)


async def _persist(
    client: httpx.AsyncClient,
    url: str,
    part: _Part,
    *,
    checksum: Checksum | None,
    report: Report,
    limit: int,
    patience: Patience,
) -> None:
    """Try until it is there, or until the server brought nothing new so many times."""
    failures, most, pause = 0, part.size, patience.first_pause
    while True:
        try:
            await _attempt(client, url, part, checksum=checksum, report=report, limit=limit)
            return
        except (_TryAgain, httpx.TransportError) as error:
            why = str(error) or type(error).__name__
            asked = error.pause if isinstance(error, _TryAgain) else 0
            if isinstance(error, httpx.UnsupportedProtocol) or "CERTIFICATE_VERIFY_FAILED" in why:
                raise _failed(url, why) from error
        except (httpx.TooManyRedirects, httpx.InvalidURL, httpx.DecodingError) as error:
            raise _failed(url, str(error)) from error
        if part.size >= most + patience.progress:
            failures, most, pause = 0, part.size, patience.first_pause
        failures += 1
        if failures >= patience.attempts:
            kept = f"{format_size(part.size)} are kept: the same command goes on from there." if part.size else ""
            raise _failed(
                url, f"{why} ({failures} times)", kept or "Check the address and the network, then try again."
            )
        await asyncio.sleep(min(max(pause, asked), patience.longest_pause))
        pause *= 2


def _failed(url: str, why: str, next_step: str = "Check the address.") -> DownloadFailed:
    return DownloadFailed(f"can't download {public(url)}", why, next_step)


async def _attempt(
    client: httpx.AsyncClient, url: str, part: _Part, *, checksum: Checksum | None, report: Report, limit: int
) -> None:
    """One request, from where the part ends if that is safe."""
    headers = {}
    if part.size and part.validators.for_range:
        headers = {"Range": f"bytes={part.size}-", "If-Range": part.validators.for_range}
    elif part.size and checksum:
        # Nothing tells whether the file is still the same; the checksum will.
        headers = {"Range": f"bytes={part.size}-"}
    async with client.stream("GET", url, headers=headers) as response:
        _check_status(response, url, secured=checksum is not None)
        if response.status_code == 416 and _range_of(response)[1] == part.size:
            return
        total = _accept(response, part, secured=checksum is not None)
        if max(total or 0, part.size) > limit:
            raise _failed(url, f"it has {format_size(total or 0)}, more than {format_size(limit)}")
        _check_room(part, total)
        await _receive(response, part, total=total, report=report, limit=limit)
    if part.size == 0 and not total:
        raise _failed(url, "it is empty")
    if total is not None and part.size != total:
        raise _TryAgain(f"the server sent {part.size} of {total} bytes")


def _check_status(response: httpx.Response, url: str, *, secured: bool) -> None:
    hops = [*(hop.url for hop in response.history), response.url]
    if hops[0].scheme == "https" and any(hop.scheme != "https" for hop in hops) and not secured:
        raise _failed(url, "it is redirected to an address without TLS", "Give its --checksum, or another address.")
    code = response.status_code
    if code in (408, 429) or code >= 500:
        asked = response.headers.get("Retry-After", "")
        raise _TryAgain(f"the server says {code} {response.reason_phrase}", float(asked) if asked.isdecimal() else 0)
    if code not in (200, 206, 416):
        raise _failed(url, f"the server says {code} {response.reason_phrase}")


def _range_of(response: httpx.Response) -> tuple[int | None, int | None]:
    """First byte and whole size that the server tells in Content-Range."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if match is None:
        return None, None
    return (int(match[1]) if match[1] else None), (int(match[3]) if match[3].isdecimal() else None)


def _accept(response: httpx.Response, part: _Part, *, secured: bool) -> int | None:
    """Decide whether the answer goes on from the part or starts anew; the size of the whole if it is known."""
    if response.status_code == 206:
        start, total = _range_of(response)
        if start != part.size or part.validators.total not in (None, total):
            part.remove()
            raise _TryAgain("the server sent another piece than was asked for")
        return total
    if response.status_code == 416:
        part.remove()
        raise _TryAgain("the file on the server has changed")
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    if total is None and "Transfer-Encoding" not in response.headers and not secured:
        raise _failed(str(response.url), "the server doesn't tell where the file ends", "Give its --checksum.")
    part.begin(
        Validators(
            etag=response.headers.get("ETag", ""), modified=response.headers.get("Last-Modified", ""), total=total
        )
    )
    return total


def _check_room(part: _Part, total: int | None) -> None:
    if total is not None and shutil.disk_usage(part.path.parent).free < total - part.size + HEADROOM:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {format_size(total - part.size)} are to come")


async def _receive(response: httpx.Response, part: _Part, *, total: int | None, report: Report, limit: int) -> None:
    told = -MIB
    descriptor = os.open(part.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # As it came: some servers call a .gz file's own compression a Content-Encoding.
        async for chunk in response.aiter_raw():
            write_at(descriptor, chunk, part.size)
            part.size += len(chunk)
            if part.size > limit:
                raise _failed(str(response.url), f"it has more than {format_size(limit)}")
            if part.size - told >= MIB:
                report(Progress(step="download", done=part.size, total=total, unit="bytes"))
                told = part.size
    finally:
        os.close(descriptor)
    report(Progress(step="download", done=part.size, total=total, unit="bytes"))
