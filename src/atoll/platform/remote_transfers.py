"""Large files to and from an agent, which go on where a lost connection left them."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from atoll.errors import AtollError, NetworkFailed, StorageFailed, WrongState, from_os_error
from atoll.host.files import CHUNK
from atoll.images.source import opened
from atoll.model.image import Image
from atoll.model.operation import Progress
from atoll.model.requests import ImportRequest
from atoll.model.transfer import BundleRequest, Upload, UploadedImage, UploadRequest, WrittenBundle
from atoll.platform import routes
from atoll.platform.api import Report
from atoll.platform.wire import Wire, decoded

PATIENCE = 60.0
"""Seconds for which a connection is tried again without a byte getting through."""
_UPLOADS = f"{routes.VERSION}/uploads"
_EXPORTS = f"{routes.VERSION}/exports"


class _Patience:
    """How long, and how often, a lost connection is tried again."""

    def __init__(self) -> None:
        self._done = -1
        self._delay = 0.1
        self._until = 0.0

    async def wait(self, done: int, lost: NetworkFailed) -> None:
        """Wait a little; raises what happened once nothing has got through for long."""
        now = asyncio.get_running_loop().time()
        if done != self._done:
            self._done, self._delay, self._until = done, 0.1, now + PATIENCE
        if now > self._until:
            raise lost
        await asyncio.sleep(self._delay)
        self._delay = min(2 * self._delay, 5.0)


@contextlib.asynccontextmanager
async def uploaded(wire: Wire, descriptor: int, *, name: str, report: Report | None) -> AsyncIterator[str]:
    """Send a file; the id of its upload, which is gone after the block. Raises `NetworkFailed`, `StorageFailed`."""
    size = os.fstat(descriptor).st_size
    wanted = msgspec.json.encode(UploadRequest(size=size, name=name))
    async with wire.request("POST", _UPLOADS, content=wanted) as response:
        made: Upload = decoded(await response.aread(), Upload)
    path = f"{_UPLOADS}/{made.id}"
    try:
        await _send_all(wire, path, descriptor, size=size, report=report)
        yield made.id
    finally:
        await _dropped(wire, path)


async def _send_all(wire: Wire, path: str, descriptor: int, *, size: int, report: Report | None) -> None:
    done, patience = 0, _Patience()

    def tell(offset: int) -> None:
        if report:
            report(Progress(step="upload", done=offset, total=size, unit="bytes"))

    while done < size:
        try:
            headers = {"Upload-Offset": str(done), "Content-Type": "application/octet-stream"}
            content = _pieces(descriptor, done, size, tell)
            async with wire.request("PATCH", path, content=content, headers=headers, endless=True) as response:
                await response.aread()
            done = await _reached(wire, path)
            if done < size:
                raise StorageFailed(
                    "can't read the file", "it became shorter meanwhile", "Wait until nothing writes it."
                )
        except (NetworkFailed, WrongState) as error:
            lost = error if isinstance(error, NetworkFailed) else NetworkFailed(error.what, error.why)
            await patience.wait(done, lost)
            with contextlib.suppress(NetworkFailed):
                done = await _reached(wire, path)


async def _pieces(descriptor: int, offset: int, size: int, tell: Callable[[int], None]) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(os.pread, descriptor, min(CHUNK, size - offset), offset):
            yield piece
            offset += len(piece)
            tell(offset)
    except OSError as error:
        raise from_os_error(error, "read the file") from error


async def _reached(wire: Wire, path: str) -> int:
    """How many bytes are there."""
    found: Upload = await wire.get(path, Upload)
    return found.offset


async def _dropped(wire: Wire, path: str) -> None:
    """It isn't needed any more; if that can't be said, it goes by itself after a time."""
    with contextlib.suppress(AtollError):
        async with wire.request("DELETE", path):
            pass


async def write_bundle(wire: Wire, request: BundleRequest, *, report: Report | None) -> WrittenBundle:
    """Have a bundle written over there. Raises `StorageFailed` when it has no room."""
    content = msgspec.json.encode(request)
    return await wire.change("POST", _EXPORTS, content=content, kind=WrittenBundle, report=report)  # type: ignore[no-any-return]


async def fetch_bundle(wire: Wire, file: BinaryIO, written: WrittenBundle, *, report: Report | None) -> None:
    """Fetch it; over there it is gone then."""
    path = f"{_EXPORTS}/{written.id}"
    done, patience = 0, _Patience()
    try:
        while done < written.size:
            try:
                async with wire.request("GET", path, headers={"Range": f"bytes={done}-"}, endless=True) as response:
                    async for piece in response.aiter_stream():
                        await asyncio.to_thread(file.write, piece)
                        done += len(piece)
                        if report:
                            report(Progress(step="download", done=done, total=written.size, unit="bytes"))
            except NetworkFailed as error:
                await patience.wait(done, error)
    finally:
        await _dropped(wire, path)


async def import_image(wire: Wire, request: ImportRequest, *, report: Report | None) -> Image:
    """Let the agent make an image of a file of ours."""
    async with contextlib.AsyncExitStack() as stack:

        async def sent(path: Path) -> str:
            source = stack.enter_context(opened(path))
            upload = uploaded(wire, source.descriptor, name=path.name, report=report)
            found = await stack.enter_async_context(upload)
            source.check_unchanged()
            return found

        given = {each: getattr(request, each) for each in UploadedImage.__struct_fields__ if each != "upload"}
        if request.initrd is not None:
            given["initrd"] = await sent(Path(request.initrd))
        wanted = UploadedImage(upload=await sent(Path(request.path)), **given)
        content = msgspec.json.encode(wanted)
        return await wire.change(  # type: ignore[no-any-return]
            "POST", f"{routes.VERSION}/images/import", content=content, kind=Image, report=report
        )
