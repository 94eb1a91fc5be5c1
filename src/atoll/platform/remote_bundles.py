"""Bundles to and from an agent: whole files, or pipes."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from atoll.errors import from_os_error
from atoll.model.operation import Progress
from atoll.model.vm import VmInfo
from atoll.platform import routes
from atoll.platform.api import BundleFile, Report
from atoll.platform.wire import Wire, decoded

_PIECE = 1 << 18


async def download(wire: Wire, path: BundleFile, query: Mapping[str, Any], *, report: Report | None) -> None:
    """Write what the agent exports; a file has its name once it is whole."""
    with _written(path) as file:
        done = 0
        async for piece in wire.bytes_of(f"{routes.VERSION}/export", query=query):
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


async def upload(wire: Wire, path: BundleFile, name: str | None, *, report: Report | None) -> VmInfo:
    """Let the agent import a bundle of ours; the VM that it made."""
    with _read(path) as file:
        total = os.fstat(file.fileno()).st_size or None

        async def pieces() -> AsyncIterator[bytes]:
            done = 0
            while piece := await asyncio.to_thread(file.read, _PIECE):
                yield piece
                done += len(piece)
                if report:
                    report(Progress(step="import", done=done, total=total, unit="bytes"))

        headers = {"Content-Type": "application/x-tar"}
        async with wire.request(
            "POST", f"{routes.VERSION}/import", query={"name": name}, content=pieces(), headers=headers, endless=True
        ) as response:
            return decoded(await response.aread(), VmInfo)  # type: ignore[no-any-return]
