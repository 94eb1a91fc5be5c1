"""Large files in pieces, so that a lost connection costs little: uploads, and bundles that are written first.

POST /v1/uploads             announce a file                 POST /v1/exports        write a bundle
PATCH /v1/uploads/ID         send the next piece             GET /v1/exports/ID      fetch it; Range goes on
HEAD /v1/uploads/ID          how far it is                   DELETE /v1/exports/ID   it was fetched
POST /v1/import?upload=ID    use it, also POST /v1/images/import
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, head, patch, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import Parameter
from litestar.response import Stream

from atoll.agent.handlers import Agent, as_task
from atoll.agent.pipes import written_while_read
from atoll.errors import InvalidInput, WrongState
from atoll.host.files import CHUNK
from atoll.layout import Layout
from atoll.model.image import Image
from atoll.model.requests import ImportRequest
from atoll.model.transfer import BundleRequest, Upload, UploadedImage, UploadRequest, WrittenBundle
from atoll.model.vm import VmInfo
from atoll.operations import transfers
from atoll.platform.api import Report

SWEEP_EVERY = 600.0
"""Seconds between two looks for what nobody goes on with."""
_OPERATE = {"scope": "operate"}
AnyRequest = Request[Any, Any, Any]


@contextlib.asynccontextmanager
async def swept(layout: Layout) -> AsyncIterator[None]:
    """Remove, as long as it lasts, the transfers that nobody goes on with."""

    async def work() -> None:
        while True:
            await asyncio.to_thread(transfers.sweep, layout)
            await asyncio.sleep(SWEEP_EVERY)

    sweeping = asyncio.create_task(work())
    try:
        yield
    finally:
        sweeping.cancel()


def transfer_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    """Those of the table above."""
    return [*_upload_handlers(agent), *_import_handlers(agent), *_export_handlers(agent)]


def _upload_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    layout = agent.host.layout
    writing: dict[str, object] = {}
    """Whose turn it is: the request that came last. The one before may hang on a connection that is dead."""

    @post("/v1/uploads", tags=["uploads"], operation_id="uploads_begin", opt=_OPERATE, status_code=201)
    async def begin(data: UploadRequest) -> Upload:
        """Announce a file. It is kept for a day after its last piece."""
        return transfers.begin_upload(layout, data)

    @head("/v1/uploads/{upload:str}", tags=["uploads"], operation_id="uploads_look", opt=_OPERATE)
    async def look(upload: str) -> Response[None]:
        """How far it is: `Upload-Offset` of `Upload-Length`."""
        return Response(None, headers=_told(transfers.find_upload(layout, upload)))

    @get("/v1/uploads/{upload:str}", tags=["uploads"], operation_id="uploads_show", opt=_OPERATE)
    async def show(upload: str) -> Upload:
        """The same as an object, and errors with their text."""
        return transfers.find_upload(layout, upload)

    @patch("/v1/uploads/{upload:str}", tags=["uploads"], operation_id="uploads_send", opt=_OPERATE, status_code=204)
    async def send(
        request: AnyRequest,
        upload: str,
        offset: Annotated[int, Parameter(header="Upload-Offset", ge=0, description="where the body begins")],
    ) -> Response[None]:
        """The next bytes, from where it is on. What came of a body that broke off is kept."""
        found = transfers.find_upload(layout, upload)
        if found.offset != offset:
            raise WrongState(
                f"the upload {upload} doesn't go on at {offset}", f"it has {found.offset} bytes", "Go on from there."
            )
        turn = writing[upload] = object()
        try:
            async with contextlib.aclosing(_gathered(request.stream())) as pieces:
                async for piece in pieces:
                    if writing.get(upload) is not turn:
                        raise WrongState(f"another request goes on with the upload {upload}")
                    found = await asyncio.shield(asyncio.to_thread(transfers.append, layout, found, piece))
        finally:
            if writing.get(upload) is turn:
                del writing[upload]
        return Response(None, headers=_told(found))

    @delete("/v1/uploads/{upload:str}", tags=["uploads"], operation_id="uploads_drop", opt=_OPERATE)
    async def drop(upload: str) -> None:
        """It isn't needed; fine when it is gone."""
        transfers.drop(layout, "upload", upload)

    send.request_max_body_size = None
    return [begin, look, show, send, drop]


def _told(upload: Upload) -> dict[str, str]:
    return {"Upload-Offset": str(upload.offset), "Upload-Length": str(upload.size), "Cache-Control": "no-store"}


async def _gathered(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Pieces of a size that is worth a write; the last also when the client goes on the way."""
    waiting = bytearray()
    try:
        async for piece in pieces:
            waiting += piece
            if len(waiting) >= CHUNK:
                yield bytes(waiting)
                waiting.clear()
    except Exception:
        if waiting:
            yield bytes(waiting)
        raise
    if waiting:
        yield bytes(waiting)


def _import_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    layout = agent.host.layout

    @post("/v1/import", tags=["bundles"], operation_id="host_import", opt=_OPERATE, status_code=200)
    async def import_bundle(request: AnyRequest, name: str | None = None, upload: str | None = None) -> VmInfo:
        """A stopped VM of a bundle, which is an upload or else the body."""
        if upload is None:
            made = await written_while_read(request.stream(), lambda file: agent.host.import_bundle(file, name))
            return await made.info()
        uploaded = upload

        async def work(report: Report) -> VmInfo:
            path, _ = await transfers.whole_upload(layout, uploaded, report)
            made = await agent.host.import_bundle(path, name, report=report)
            transfers.drop(layout, "upload", uploaded)
            return await made.info()

        asked = [upload, name]
        return await as_task(agent, request, call="host.import_bundle", subject=name or "", asked=asked, work=work)  # type: ignore[return-value]

    @post("/v1/images/import", tags=["images"], operation_id="images_import_file", opt=_OPERATE, status_code=200)
    async def import_image(request: AnyRequest, data: UploadedImage) -> Image:
        """An image of a file that was uploaded: a disk, a CD, a kernel."""

        async def work(report: Report) -> Image:
            from atoll.images.importer import name_from

            path, found = await transfers.whole_upload(layout, data.upload, report)
            given = msgspec.structs.asdict(data)
            del given["upload"]
            if data.initrd is not None:
                given["initrd"] = str((await transfers.whole_upload(layout, data.initrd, report))[0])
            given["name"] = data.name or name_from(found.name)
            wanted = ImportRequest(path=str(path), source=found.name or "an upload", **given)
            made = await agent.host.images.import_file(wanted, report=report)
            for each in (data.upload, data.initrd or ""):
                transfers.drop(layout, "upload", each)
            return made

        subject = data.name or ""
        return await as_task(agent, request, call="images.import_file", subject=subject, asked=data, work=work)  # type: ignore[return-value]

    import_bundle.request_max_body_size = None
    return [import_bundle, import_image]


def _export_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    layout = agent.host.layout

    @post("/v1/exports", tags=["bundles"], operation_id="exports_write", opt=_OPERATE, status_code=200)
    async def write(request: AnyRequest, data: BundleRequest) -> WrittenBundle:
        """Write a bundle to be fetched. It is kept for an hour after it was last asked for."""

        async def work(report: Report) -> WrittenBundle:
            bundle = transfers.new_bundle(layout)
            target = layout.transfer("bundle", bundle).content
            try:
                await agent.host.export(data.source, target, base=data.base, disk_only=data.disk_only, report=report)
                return WrittenBundle(id=bundle, size=target.stat().st_size)
            except BaseException:
                transfers.drop(layout, "bundle", bundle)
                raise

        return await as_task(agent, request, call="host.export", subject=data.source, asked=data, work=work)  # type: ignore[return-value]

    @get("/v1/exports/{bundle:str}", tags=["bundles"], operation_id="exports_fetch", opt=_OPERATE)
    async def fetch(request: AnyRequest, bundle: str) -> Stream:
        """A bundle that was written, or with `Range: bytes=N-` the rest of it."""
        path, size = transfers.find_bundle(layout, bundle)
        start, end = _range(request.headers.get("range"), size)
        headers = {"ETag": f'"{bundle}"', "Accept-Ranges": "bytes", "Content-Length": str(end - start)}
        status = 200
        if (start, end) != (0, size):
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{size}"
        pieces = _read(path, start, end)
        return Stream(pieces, status_code=status, headers=headers, media_type="application/x-tar")

    @delete("/v1/exports/{bundle:str}", tags=["bundles"], operation_id="exports_drop", opt=_OPERATE)
    async def drop(bundle: str) -> None:
        """It was fetched; fine when it is gone."""
        transfers.drop(layout, "bundle", bundle)

    return [write, fetch, drop]


def _range(header: str | None, size: int) -> tuple[int, int]:
    """Where to begin and to end. What isn't one simple range is answered with the whole, as RFC 9110 allows."""
    found = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", header or "")
    if not found:
        return 0, size
    start, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
    if not start < end:
        raise InvalidInput(f"there are no bytes {start} to {end}", f"the bundle has {size}")
    return start, end


async def _read(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end and (piece := await asyncio.to_thread(file.read, min(CHUNK, end - start))):
            yield piece
            start += len(piece)
