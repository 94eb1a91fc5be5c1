"""What isn't JSON: logs, pictures of displays, captures of networks."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import Parameter
from litestar.response import Stream

from atoll.agent.handlers import Agent
from atoll.agent.pipes import read_while_written, written_while_read
from atoll.model.requests import CaptureRequest
from atoll.model.vm import VmInfo


def byte_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    """One for each kind of bytes."""

    @get("/v1/vms/{vm:str}/logs", tags=["vms"], operation_id="vm_logs", opt={"scope": "read"})
    async def logs(
        vm: str,
        follow: bool = False,
        tail: Annotated[int | None, Parameter(ge=0)] = None,
        source: Literal["serial", "qemu", "events"] = "serial",
    ) -> Stream:
        """What it wrote, oldest first; with `follow` until it stops."""
        found = await agent.host.get(vm)
        written = found.logs(follow=follow, tail=tail, source=source)
        # A guest that is followed may be silent for long; the client gets its answer now.
        return Stream(written if follow else await _begun(written), media_type="application/octet-stream")

    @get("/v1/vms/{vm:str}/screenshot", tags=["vms"], operation_id="vm_screenshot", opt={"scope": "read"})
    async def screenshot(vm: str) -> Response[bytes]:
        """A PNG of its display."""
        return Response(await (await agent.host.get(vm)).screenshot(), media_type="image/png")

    @get("/v1/vms/{vm:str}/capture", tags=["vms"], operation_id="vm_capture", opt={"scope": "operate"})
    async def capture(
        vm: str,
        network: str | None = None,
        nic: str | None = None,
        count: Annotated[int | None, Parameter(ge=1)] = None,
        seconds: Annotated[float | None, Parameter(gt=0)] = None,
    ) -> Stream:
        """What passes through one of its cards, as a pcap file."""
        wanted = CaptureRequest(network=network, nic=nic, count=count, seconds=seconds)
        return Stream(
            await _begun((await agent.host.get(vm)).net_capture(wanted)), media_type="application/vnd.tcpdump.pcap"
        )

    @get("/v1/export", tags=["bundles"], operation_id="host_export", opt={"scope": "operate"})
    async def export(source: str, base: str | None = None, disk_only: bool = False) -> Stream:
        """A VM (`web`) as it is now, or a snapshot (`web@clean`) with its memory, as one file."""
        pieces = read_while_written(lambda file: agent.host.export(source, file, base=base, disk_only=disk_only))
        return Stream(await _begun(pieces), media_type="application/x-tar")

    @post("/v1/import", tags=["bundles"], operation_id="host_import", opt={"scope": "operate"}, status_code=200)
    async def import_bundle(request: Request[Any, Any, Any], name: str | None = None) -> VmInfo:
        """A stopped VM of a bundle, which is the body."""
        made = await written_while_read(request.stream(), lambda file: agent.host.import_bundle(file, name))
        return await made.info()

    import_bundle.request_max_body_size = None
    return [logs, screenshot, capture, export, import_bundle]


async def _begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, the first of which is there: what can't be had is told before an answer is begun."""
    first = await anext(pieces, None)

    async def all_of_them() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield first
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # they are generators

    return all_of_them()
