"""The façade over HTTP: an agent's host, with the same names as the one of this process."""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar

import msgspec

from atoll.errors import Unsupported
from atoll.model import names
from atoll.model.audit import AuditEntry
from atoll.model.image import Image
from atoll.model.requests import CaptureRequest, CreateRequest, ImportRequest
from atoll.model.streams import ShellOpening
from atoll.model.transfer import BundleRequest
from atoll.model.vm import Event, ExecRequest, ExecResult, VmInfo
from atoll.operations.guest_copy import Execute, copy_from, copy_to
from atoll.operations.resolve import as_request
from atoll.platform import remote_streams, remote_transfers, routes
from atoll.platform.api import (
    AsyncBackups,
    AsyncGroups,
    AsyncHost,
    AsyncImages,
    AsyncNetworks,
    AsyncOperations,
    AsyncPools,
    AsyncVm,
    BundleFile,
    ByteSink,
    Connection,
    Drain,
    Report,
    Terminal,
)
from atoll.platform.copies import AsyncCopies
from atoll.platform.remote_bundles import export, import_bundle
from atoll.platform.wire import Place, Wire, decoded

P = ParamSpec("P")
R = TypeVar("R")


class Part:
    """Something of an agent's: what its methods send is told by `platform/routes.py`."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    @property
    def _receiver(self) -> str | None:
        """The VM that the methods are about, if it is one."""
        return None


def _there(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """The same method, done by the agent."""
    call = routes.of(method)
    signature = inspect.signature(method)

    @functools.wraps(method)
    async def send(self: Part, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        report: Report | None = given.pop("report", None)
        given = {name: _whole(call, name, value) for name, value in given.items()}
        found = await self._wire.call(call, self._receiver, given, report)
        return _handles(self._wire, call, found)  # type: ignore[no-any-return]

    return send


def _whole(call: routes.Call, name: str, value: Any) -> Any:
    """A request that was named by its first field only, as the request."""
    kind = next(each.type for each in routes.parameters(call) if each.name == name)
    if isinstance(value, str) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{kind.__struct_fields__[0]: value})
    return value


def _handles(wire: Wire, call: routes.Call, found: Any) -> Any:
    """What came, with handles in place of the descriptions of VMs."""
    returned = routes.returned(call)
    if returned is AsyncVm:
        return RemoteVm(wire, found)
    return AsyncCopies([RemoteVm(wire, each) for each in found]) if returned is AsyncCopies else found


class RemoteVm(Part):
    """A VM of an agent's host; see `platform/api.py`."""

    def __init__(self, wire: Wire, info: VmInfo) -> None:
        super().__init__(wire)
        self._id = info.vm.id
        self._name = info.vm.name

    def __repr__(self) -> str:
        return f"<Vm {self._name} {self._id[: names.SHORT_ID]} at {self._wire.place.shown}>"

    @property
    def _receiver(self) -> str:
        return self._id

    @property
    def id(self) -> str:
        return self._id

    @property
    def name(self) -> str:
        return self._name

    info = _there(AsyncVm.info)
    set = _there(AsyncVm.set)
    rm = _there(AsyncVm.rm)
    start = _there(AsyncVm.start)
    stop = _there(AsyncVm.stop)
    restart = _there(AsyncVm.restart)
    pause = _there(AsyncVm.pause)
    resume = _there(AsyncVm.resume)
    suspend = _there(AsyncVm.suspend)
    wait = _there(AsyncVm.wait)
    type = _there(AsyncVm.type)
    key = _there(AsyncVm.key)
    stats = _there(AsyncVm.stats)
    ports = _there(AsyncVm.ports)
    publish = _there(AsyncVm.publish)
    unpublish = _there(AsyncVm.unpublish)
    disks = _there(AsyncVm.disks)
    disk_add = _there(AsyncVm.disk_add)
    disk_rm = _there(AsyncVm.disk_rm)
    disk_resize = _there(AsyncVm.disk_resize)
    shares = _there(AsyncVm.shares)
    share_add = _there(AsyncVm.share_add)
    share_rm = _there(AsyncVm.share_rm)
    net_attach = _there(AsyncVm.net_attach)
    net_set = _there(AsyncVm.net_set)
    net_detach = _there(AsyncVm.net_detach)
    net_impair = _there(AsyncVm.net_impair)
    history = _there(AsyncVm.history)
    snapshot = _there(AsyncVm.snapshot)
    restore = _there(AsyncVm.restore)
    diff = _there(AsyncVm.diff)
    forget = _there(AsyncVm.forget)
    fork = _there(AsyncVm.fork)
    clone = _there(AsyncVm.clone)
    backup = _there(AsyncVm.backup)

    async def rename(self, name: str) -> None:
        await self._wire.call(routes.of(AsyncVm.rename), self._id, {"name": name}, None)
        self._name = name

    async def exec(
        self,
        command: Sequence[str] | ExecRequest,
        *,
        stdin: bytes | AsyncIterator[bytes] | None = None,
        on_stdout: ByteSink | None = None,
        on_stderr: ByteSink | None = None,
        drain: Drain | None = None,
    ) -> ExecResult:
        request = command if isinstance(command, ExecRequest) else ExecRequest(argv=tuple(command))
        return await self._execute(request, stdin=stdin, on_stdout=on_stdout, on_stderr=on_stderr, drain=drain)

    @property
    def _execute(self) -> Execute:
        return functools.partial(remote_streams.execute, self._wire, self._id)

    async def shell(self, command: Sequence[str] = (), *, user: str | None = None) -> Terminal:
        opening = ShellOpening(command=tuple(command), user=user)
        return await remote_streams.open_shell(self._wire, self._id, opening)

    async def console(self) -> Terminal:
        return await remote_streams.open_console(self._wire, self._id)

    async def connect(self, port: int) -> Connection:
        return await remote_streams.open_connection(self._wire, f"/vms/{self._id}/connect/{port}")

    async def vnc(self) -> Connection:
        return await remote_streams.open_connection(self._wire, f"/vms/{self._id}/vnc")

    async def copy_to(self, source: Path, destination: str, *, report: Report | None = None) -> None:
        await copy_to(self._execute, self._name, source, destination, report=report)

    async def copy_from(self, source: str, destination: Path, *, report: Report | None = None) -> None:
        await copy_from(self._execute, self._name, source, destination, report=report)

    def logs(
        self, *, follow: bool = False, tail: int | None = None, source: Literal["serial", "qemu", "events"] = "serial"
    ) -> AsyncIterator[bytes]:
        return self._wire.bytes_of(f"{self._path}/logs", query={"follow": follow, "tail": tail, "source": source})

    async def screenshot(self) -> bytes:
        return b"".join([piece async for piece in self._wire.bytes_of(f"{self._path}/screenshot")])

    async def net_capture(
        self, request: CaptureRequest | None = None, *, on_lost: Callable[[int], None] | None = None
    ) -> AsyncIterator[bytes]:
        query = msgspec.structs.asdict(request or CaptureRequest())
        async for piece in self._wire.bytes_of(f"{self._path}/capture", query=query):
            yield piece

    async def export(
        self,
        path: BundleFile,
        *,
        snapshot: str | None = None,
        base: str | None = None,
        disk_only: bool = False,
        report: Report | None = None,
    ) -> None:
        source = self._id if snapshot is None else f"{self._id}@{snapshot}"
        request = BundleRequest(source=source, base=base, disk_only=disk_only)
        await export(self._wire, path, request, report=report)

    @property
    def _path(self) -> str:
        return f"{routes.VERSION}/vms/{self._id}"


class RemoteImages(Part):
    """The images of an agent's host."""

    ls = _there(AsyncImages.ls)
    show = _there(AsyncImages.show)
    create = _there(AsyncImages.create)
    rm = _there(AsyncImages.rm)
    catalogue = _there(AsyncImages.catalogue)
    build = _there(AsyncImages.build)
    pull = _there(AsyncImages.pull)

    async def import_file(self, request: ImportRequest, *, report: Report | None = None) -> Image:
        return await remote_transfers.import_image(self._wire, request, report=report)

    tag = _there(AsyncImages.tag)
    prune = _there(AsyncImages.prune)


class RemoteOperations(Part):
    """Its journal."""

    ls = _there(AsyncOperations.ls)
    show = _there(AsyncOperations.show)
    cancel = _there(AsyncOperations.cancel)
    retry = _there(AsyncOperations.retry)


class RemotePools(Part):
    """Its pools."""

    ls = _there(AsyncPools.ls)
    fill = _there(AsyncPools.fill)
    take = _there(AsyncPools.take)
    rm = _there(AsyncPools.rm)


class RemoteGroups(Part):
    """Its security groups."""

    ls = _there(AsyncGroups.ls)
    create = _there(AsyncGroups.create)
    show = _there(AsyncGroups.show)
    set = _there(AsyncGroups.set)
    rm = _there(AsyncGroups.rm)


class RemoteNetworks(Part):
    """Its networks."""

    ls = _there(AsyncNetworks.ls)
    create = _there(AsyncNetworks.create)
    show = _there(AsyncNetworks.show)
    rm = _there(AsyncNetworks.rm)
    exec = _there(AsyncNetworks.exec)

    @property
    def groups(self) -> RemoteGroups:
        return RemoteGroups(self._wire)

    async def command_line(self, reference: str, command: Sequence[str]) -> list[str]:
        if self._wire.place.socket is not None:
            from atoll.platform.local import LocalHost

            async with LocalHost() as host:
                return await host.networks.command_line(reference, command)
        raise Unsupported(
            "a program can be started in a network only on the computer that has it",
            next_step="Use `exec`, which runs it there.",
        )


class RemoteBackups(Part):
    """Folders of backups, on the agent's host."""

    ls = _there(AsyncBackups.ls)
    unreadable = _there(AsyncBackups.unreadable)
    show = _there(AsyncBackups.show)
    verify = _there(AsyncBackups.verify)
    prune = _there(AsyncBackups.prune)
    restore = _there(AsyncBackups.restore)


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

    ls = _there(AsyncHost.ls)
    memory = _there(AsyncHost.memory)
    clone = _there(AsyncHost.clone)
    fork = _there(AsyncHost.fork)
    diff = _there(AsyncHost.diff)
    stop_all = _there(AsyncHost.stop_all)
    prune = _there(AsyncHost.prune)
    fsck = _there(AsyncHost.fsck)

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
