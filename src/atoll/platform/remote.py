"""The façade over HTTP: an agent's host, with the same names as the one of this process."""

from collections.abc import AsyncIterator
from typing import Self

from atoll.model.audit import AuditEntry
from atoll.model.requests import CreateRequest
from atoll.model.transfer import BundleRequest
from atoll.model.vm import Event
from atoll.operations.resolve import as_request
from atoll.platform import routes
from atoll.platform.api import AsyncHost, AsyncVm, BundleFile, Report
from atoll.platform.remote_bundles import export, import_bundle
from atoll.platform.remote_parts import RemoteBackups, RemoteImages, RemoteNetworks, RemoteOperations, RemotePools
from atoll.platform.remote_vm import Part, RemoteVm, there
from atoll.platform.wire import Place, Wire, decoded


class RemoteHost(Part):
    """The host of an agent; see `platform/api.py`. Its connections are open inside its `async with` block."""

    def __init__(self, place: Place) -> None:
        super().__init__(Wire(place))

    def __repr__(self) -> str:
        return f"<Host {self._wire.place.shown}>"

    @property
    def images(self) -> RemoteImages:
        return RemoteImages(self._wire)

    @property
    def operations(self) -> RemoteOperations:
        return RemoteOperations(self._wire)

    @property
    def pools(self) -> RemotePools:
        return RemotePools(self._wire)

    @property
    def networks(self) -> RemoteNetworks:
        return RemoteNetworks(self._wire)

    @property
    def backups(self) -> RemoteBackups:
        return RemoteBackups(self._wire)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._wire.close()

    def notices(self) -> list[str]:
        """Recovery is the agent's, and its log tells it."""
        return []

    ls = there(AsyncHost.ls)
    memory = there(AsyncHost.memory)
    clone = there(AsyncHost.clone)
    fork = there(AsyncHost.fork)
    diff = there(AsyncHost.diff)
    stop_all = there(AsyncHost.stop_all)
    prune = there(AsyncHost.prune)
    fsck = there(AsyncHost.fsck)

    async def get(self, reference: str) -> RemoteVm:
        return RemoteVm(self._wire, await self._wire.call(routes.of(AsyncVm.info), reference, {}, None))

    async def create(self, image: str | CreateRequest, *, report: Report | None = None, **options: object) -> RemoteVm:
        given = {"request": as_request(image, options)}
        return RemoteVm(self._wire, await self._wire.call(routes.of(AsyncHost.create), None, given, report))

    async def run(
        self,
        image: str | CreateRequest,
        *,
        report: Report | None = None,
        timeout: float | None = None,
        **options: object,
    ) -> RemoteVm:
        vm = await self.create(image, report=report, **options)
        await vm.start(wait=True, timeout=timeout)
        return vm

    async def export(
        self,
        source: str,
        path: BundleFile,
        *,
        base: str | None = None,
        disk_only: bool = False,
        report: Report | None = None,
    ) -> None:
        request = BundleRequest(source=source, base=base, disk_only=disk_only)
        await export(self._wire, path, request, report=report)

    async def import_bundle(
        self, path: BundleFile, name: str | None = None, *, report: Report | None = None
    ) -> RemoteVm:
        return RemoteVm(self._wire, await import_bundle(self._wire, path, name, report=report))

    async def events(self, *, follow: bool = True, after: int | None = None) -> AsyncIterator[Event]:
        if follow:
            async for _, data in self._wire.events(f"{routes.VERSION}/events", query={"after": after}):
                yield decoded(data, Event)
            return
        last = after or 0
        while found := await self._wire.get(f"{routes.VERSION}/events/past", list[Event], query={"after": last}):
            for event in found:
                yield event
            last = found[-1].id

    async def audit(self, *, follow: bool = False, tail: int | None = None) -> AsyncIterator[AuditEntry]:
        rest = b""
        async for piece in self._wire.bytes_of(f"{routes.VERSION}/audit", query={"follow": follow, "tail": tail}):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield decoded(line, AuditEntry)
