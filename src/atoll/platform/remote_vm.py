"""A VM of an agent's host, over HTTP, and how the façade's methods are sent there."""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import msgspec

from atoll.model import names
from atoll.model.requests import CaptureRequest
from atoll.model.streams import ShellOpening
from atoll.model.transfer import BundleRequest
from atoll.model.vm import ExecRequest, ExecResult, VmInfo
from atoll.operations.guest_copy import Execute, copy_from, copy_to
from atoll.platform import remote_streams, routes
from atoll.platform.api import AsyncVm, BundleFile, ByteSink, Connection, Drain, Report, Terminal
from atoll.platform.copies import AsyncCopies
from atoll.platform.remote_bundles import export
from atoll.platform.wire import Wire

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


def there(
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

    info = there(AsyncVm.info)
    set = there(AsyncVm.set)
    rm = there(AsyncVm.rm)
    start = there(AsyncVm.start)
    stop = there(AsyncVm.stop)
    restart = there(AsyncVm.restart)
    pause = there(AsyncVm.pause)
    resume = there(AsyncVm.resume)
    suspend = there(AsyncVm.suspend)
    wait = there(AsyncVm.wait)
    type = there(AsyncVm.type)
    key = there(AsyncVm.key)
    stats = there(AsyncVm.stats)
    ports = there(AsyncVm.ports)
    publish = there(AsyncVm.publish)
    unpublish = there(AsyncVm.unpublish)
    disks = there(AsyncVm.disks)
    disk_add = there(AsyncVm.disk_add)
    disk_rm = there(AsyncVm.disk_rm)
    disk_resize = there(AsyncVm.disk_resize)
    shares = there(AsyncVm.shares)
    share_add = there(AsyncVm.share_add)
    share_rm = there(AsyncVm.share_rm)
    net_attach = there(AsyncVm.net_attach)
    net_set = there(AsyncVm.net_set)
    net_detach = there(AsyncVm.net_detach)
    net_impair = there(AsyncVm.net_impair)
    history = there(AsyncVm.history)
    snapshot = there(AsyncVm.snapshot)
    restore = there(AsyncVm.restore)
    diff = there(AsyncVm.diff)
    forget = there(AsyncVm.forget)
    fork = there(AsyncVm.fork)
    clone = there(AsyncVm.clone)
    backup = there(AsyncVm.backup)

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
