"""The façade in this process: no daemon; records, locks and QEMU's sockets are all that processes share."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Self

from msgspec.structs import replace

from atoll.layout import Layout
from atoll.model.audit import AuditEntry
from atoll.model.difference import Difference
from atoll.model.finding import Finding
from atoll.model.requests import CreateRequest
from atoll.model.vm import Event, HostMemory, Stopped, VmInfo
from atoll.operations.services import Services
from atoll.platform.api import BundleFile, Report
from atoll.platform.copies import AsyncCopies
from atoll.platform.local_backups import LocalBackups
from atoll.platform.local_networks import LocalNetworks
from atoll.platform.local_parts import LocalImages, LocalOperations, LocalPools
from atoll.platform.local_vm import LocalVm

if TYPE_CHECKING:
    from atoll.host.checks import Check
    from atoll.operations.promises import Promises

# Operations are imported where they are used: `atoll ls` shall not pay for QMP, HTTP or asyncio.


def list_now(layout: Layout | None = None) -> tuple[list[VmInfo], list[str]]:
    """What `LocalHost.ls` returns, and recovery's notices; no event loop unless there is something to recover."""
    from atoll.operations import observe

    services = Services(layout)
    try:
        notices = _recover_now(services)
        vms = observe.list_vms(services)
        if services.bridges_left:
            import asyncio

            from atoll.operations import networks

            asyncio.run(networks.mend_left(services))
        return vms, notices
    finally:
        services.close()


def _recover_now(services: Services) -> list[str]:
    if not services.records.operations(unfinished=True) and not services.records.throwaways():
        return []
    import asyncio

    return asyncio.run(_settle(services))


def knock(reference: str) -> None:
    """Tell the guest agent of a VM that somebody is coming. For commands, before they import the rest."""
    from atoll.operations.guest_knock import knock

    knock(reference)


async def _settle(services: Services) -> list[str]:
    """Finish or undo what killed commands have left, and remove what `run --rm` left behind; a sentence about each."""
    notices: list[str] = []
    if services.records.operations(unfinished=True):
        from atoll.operations.recovery import recover
        from atoll.operations.registry import VERBS

        notices += await recover(services, VERBS)
    if services.records.throwaways():
        from atoll.operations.remove import remove_throwaways

        notices += await remove_throwaways(services)
    return notices


class LocalHost:
    """This computer. An async context manager; opening it settles what killed commands have left."""

    def __init__(
        self, layout: Layout | None = None, *, ends_noticed: bool = False, promises: "Promises | None" = None
    ) -> None:
        """`promises` limits the memory of the VMs that are started through it."""
        self._services = Services(layout, ends_noticed=ends_noticed)
        self._services.promises = promises
        self._notices: list[str] = []

    @property
    def layout(self) -> Layout:
        return self._services.layout

    @property
    def services(self) -> Services:
        """For the agent, which is nearer to the operations than a user of the façade."""
        return self._services

    @property
    def images(self) -> LocalImages:
        return LocalImages(self._services)

    @property
    def operations(self) -> LocalOperations:
        return LocalOperations(self._services)

    @property
    def pools(self) -> LocalPools:
        return LocalPools(self._services)

    @property
    def networks(self) -> LocalNetworks:
        return LocalNetworks(self._services)

    @property
    def backups(self) -> LocalBackups:
        return LocalBackups(self._services)

    async def __aenter__(self) -> Self:
        self._notices += await _settle(self._services)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._services.finish()
        if self._services.bridges_left:
            from atoll.operations import networks

            await networks.mend_left(self._services)
        self._services.close()

    def notices(self) -> list[str]:
        told, self._notices = self._notices, []
        return told

    async def ls(self) -> list[VmInfo]:
        from atoll.operations import observe

        return observe.list_vms(self._services)

    async def memory(self) -> HostMemory:
        from atoll.operations.host_memory import host_memory

        return host_memory(self._services)

    async def get(self, reference: str) -> LocalVm:
        return LocalVm(self._services, self._services.find_vm(reference))

    async def create(self, image: str | CreateRequest, *, report: Report | None = None, **options: object) -> LocalVm:
        from atoll.operations import resolve
        from atoll.operations.create import create

        request = resolve.as_request(image, options)
        if request.image is not None:
            from atoll.operations.images import ensure

            made = await ensure(request.image, arch=request.arch, services=self._services, report=report)
            request = replace(request, image=made.name)
        return LocalVm(self._services, await create(request, services=self._services, report=report))

    async def run(
        self,
        image: str | CreateRequest,
        *,
        report: Report | None = None,
        timeout: float | None = None,
        **options: object,
    ) -> LocalVm:
        vm = await self.create(image, report=report, **options)
        await vm.start(wait=True, timeout=timeout)
        return vm

    async def clone(
        self, source: str, name: str | None = None, *, full: bool = False, report: Report | None = None
    ) -> LocalVm:
        from atoll.operations.clone import clone, find_source

        found = find_source(source, self._services)
        return LocalVm(self._services, await clone(found, name, services=self._services, full=full, report=report))

    async def fork(
        self, source: str, count: int = 1, *, name: str | None = None, report: Report | None = None
    ) -> AsyncCopies:
        from atoll.operations.clone import find_source
        from atoll.operations.fork import fork

        made = await fork(find_source(source, self._services), count, name, services=self._services, report=report)
        return AsyncCopies(LocalVm(self._services, vm) for vm in made)

    async def diff(self, old: str, new: str, *, report: Report | None = None) -> Difference:
        from atoll.operations.diff import diff

        return await diff(old, new, services=self._services, report=report)

    async def export(
        self,
        source: str,
        path: BundleFile,
        *,
        base: str | None = None,
        disk_only: bool = False,
        report: Report | None = None,
    ) -> None:
        from atoll.model.bundle import ExportOptions
        from atoll.operations.clone import find_source
        from atoll.operations.export import export

        options = ExportOptions(base=base, disk_only=disk_only)
        await export(find_source(source, self._services), path, options, services=self._services, report=report)

    async def import_bundle(
        self, path: BundleFile, name: str | None = None, *, report: Report | None = None
    ) -> LocalVm:
        from atoll.operations.import_bundle import import_bundle

        return LocalVm(self._services, await import_bundle(path, name, services=self._services, report=report))

    async def events(self, *, follow: bool = True, after: int | None = None) -> AsyncIterator[Event]:
        records = self._services.records
        last = after if after is not None else (records.last_event() if follow else 0)
        if not follow:
            while found := records.events(after=last):
                for event in found:
                    yield event
                last = found[-1].id
            return
        from atoll.operations.events import follow_events

        async for event in follow_events(self._services, after=last):
            yield event

    async def stop_all(
        self,
        *,
        timeout: float = 60.0,
        suspend: bool = False,
        for_shutdown: bool = False,
        report: Report | None = None,
    ) -> list[Stopped]:
        from atoll.operations.stop_all import StopAll, stop_all

        how = StopAll(timeout=timeout, suspend=suspend, for_shutdown=for_shutdown)
        return await stop_all(how, services=self._services, report=report)

    def audit(self, *, follow: bool = False, tail: int | None = None) -> AsyncIterator[AuditEntry]:
        from atoll.store import audit

        return audit.entries(self.layout.audit, self.layout.refused, follow=follow, tail=tail)

    def last_event(self) -> int:
        """The id of what happened last."""
        return self._services.records.last_event()

    async def prune(self, *, every: bool = False, dry_run: bool = False) -> list[tuple[str, int]]:
        from atoll.operations.prune import prune

        return await prune(services=self._services, every=every, dry_run=dry_run)

    async def fsck(self, *, repair: bool = False, quick: bool = False, report: Report | None = None) -> list[Finding]:
        from atoll.operations.fsck import fsck

        return await fsck(services=self._services, repair=repair, quick=quick, report=report)

    async def doctor(self) -> "list[Check]":
        """Each check of this computer, with the command that mends it."""
        from atoll.operations.doctor import examine

        return await examine(self._services)


def connect_local(layout: Layout | None = None) -> LocalHost:
    """This machine."""
    return LocalHost(layout)
