"""Bundles to and from an agent: files, which go on where a connection was lost, or pipes.

This computer's agent is reached by a socket, which isn't lost while the agent runs: there nothing is stored on the way.
"""

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from atoll.errors import StorageFailed, from_os_error
from atoll.host.files import CHUNK
from atoll.model.operation import Progress
from atoll.model.transfer import BundleRequest
from atoll.model.vm import VmInfo
from atoll.platform import remote_transfers, routes
from atoll.platform.api import BundleFile, Report
from atoll.platform.wire import Wire, decoded

_IMPORT = f"{routes.VERSION}/import"


async def export(wire: Wire, path: BundleFile, request: BundleRequest, *, report: Report | None) -> None:
    """Write what the agent exports; a file has its name once it is whole."""
    with _written(path) as file:
        if wire.socket is None:
            written = None
            # A bundle that has no room over there is sent as it is written.
            with contextlib.suppress(StorageFailed):
                written = await remote_transfers.write_bundle(wire, request, report=report)
            if written is not None:
                await remote_transfers.fetch_bundle(wire, file, written, report=report)
                return
        await _streamed(wire, file, request, report=report)


async def _streamed(wire: Wire, file: BinaryIO, request: BundleRequest, *, report: Report | None) -> None:
    done = 0
    async for piece in wire.bytes_of(f"{routes.VERSION}/export", query=msgspec.structs.asdict(request)):
        await asyncio.to_thread(file.write, piece)
        done += len(piece)
        if report:
            report(Progress(step="export", done=done, unit="bytes"))


@contextlib.contextmanager
def _written(path: BundleFile) -> Iterator[BinaryIO]:
    if not isinstance(path, str | os.PathLike):
        yield path
        return
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, f"write {target}") from error


async def import_bundle(wire: Wire, path: BundleFile, name: str | None, *, report: Report | None) -> VmInfo:
    """Let the agent import a bundle of ours; the VM that it made."""
    with _read(path) as file:
        status = os.fstat(file.fileno())
        if wire.socket is not None or not stat.S_ISREG(status.st_mode) or _position(file):
            return await _sent(wire, file, name, total=status.st_size or None, report=report)
        shown = Path(path).name if isinstance(path, str | os.PathLike) else ""
        async with remote_transfers.uploaded(wire, file.fileno(), name=shown, report=report) as upload:
            query = {"upload": upload, "name": name}
            return await wire.change("POST", _IMPORT, query=query, kind=VmInfo, report=report)  # type: ignore[no-any-return]


def _position(file: BinaryIO) -> int:
    """Where an open file is read on; a bundle may be in the middle of it."""
    return os.lseek(file.fileno(), 0, os.SEEK_CUR)


@contextlib.contextmanager
def _read(path: BundleFile) -> Iterator[BinaryIO]:
    if not isinstance(path, str | os.PathLike):
        yield path
        return
    try:
        file = Path(path).open("rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    with file:
        yield file


async def _sent(wire: Wire, file: BinaryIO, name: str | None, *, total: int | None, report: Report | None) -> VmInfo:
    """As the body of the request."""

    async def pieces() -> AsyncIterator[bytes]:
        done = 0
        while piece := await asyncio.to_thread(file.read, CHUNK):
            yield piece
            done += len(piece)
            if report:
                report(Progress(step="import", done=done, total=total, unit="bytes"))

    headers = {"Content-Type": "application/x-tar"}
    async with wire.request(
        "POST", _IMPORT, query={"name": name}, content=pieces(), headers=headers, endless=True
    ) as response:
        return decoded(await response.aread(), VmInfo)  # type: ignore[no-any-return]
