"""What isn't JSON: logs, pictures of displays, captures of networks."""

from typing import Annotated, Literal

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import Parameter
from litestar.response import Stream

from atoll.agent.handlers import Agent
from atoll.agent.pipes import begun, read_while_written
from atoll.model.requests import CaptureRequest


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
        return Stream(written if follow else await begun(written), media_type="application/octet-stream")

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
            await begun((await agent.host.get(vm)).net_capture(wanted)), media_type="application/vnd.tcpdump.pcap"
        )

    @get("/v1/export", tags=["bundles"], operation_id="host_export", opt={"scope": "operate"})
    async def export(source: str, base: str | None = None, disk_only: bool = False) -> Stream:
        """A VM (`web`) as it is now, or a snapshot (`web@clean`) with its memory, as one file."""
        pieces = read_while_written(lambda file: agent.host.export(source, file, base=base, disk_only=disk_only))
        return Stream(await begun(pieces), media_type="application/x-tar")

    return [logs, screenshot, capture, export]
