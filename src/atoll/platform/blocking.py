"""The façade without `await`: each call runs on an event loop in a thread of its own, and the caller waits for it.

Calls run as plain asyncio tasks, not in the portal's cancel scope: a scope cancels again at every `await` until it is
left, and would so disturb the undo of an operation. Ctrl-C cancels the call, waits until it is undone, and is raised.

A host may be used from several threads at once. Callbacks (`report`, `on_stdout`) are called in the loop's thread.
"""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from atoll.errors import Cancelled, WrongState
from atoll.model.requests import CreateRequest
from atoll.model.vm import ExecRequest, ExecResult
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
    Report,
    Terminal,
)
from atoll.platform.copies import Copies

P = ParamSpec("P")
R = TypeVar("R")
Inner = TypeVar("Inner")

_PIECE = 1 << 16


class _Calls:
    """The loop's thread, while the host is open."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        portal: BlockingPortal = self._stack.enter_context(start_blocking_portal("asyncio"))
        self._loop = portal.call(asyncio.get_running_loop)

    def close(self) -> None:
        self._loop = None
        self._stack.close()

    def wait_for(self, make: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """The coroutine's result. When the waiting is interrupted, it is cancelled, and has ended before we return."""
        loop = self._loop
        if loop is None:
            raise WrongState("the host is not open", next_step="Use it in `with atoll.connect() as host:`.")
        ended = threading.Event()
        tasks: list[asyncio.Task[R]] = []

        def begin() -> None:
            tasks.append(loop.create_task(make()))
            tasks[0].add_done_callback(lambda task: ended.set())

        loop.call_soon_threadsafe(begin)
        interruption: BaseException | None = None
        while not ended.is_set():
            try:
                ended.wait()
            except BaseException as error:
                # Only the first one cancels: a second would cancel the undo. Each step of an undo is bounded in time.
                if interruption is None:
                    loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                interruption = error
        if interruption is not None:
            raise interruption
        try:
            return tasks[0].result()
        except asyncio.CancelledError:
            raise Cancelled("the call was cancelled", "its host was closed by another thread") from None

    def each(self, make: Callable[[], AsyncIterator[R]]) -> Iterator[R]:
        """The items as they come. Leaving the loop, or `close()`, ends the iteration on the other side too."""

        async def start() -> AsyncIterator[R]:
            return make()

        async def following() -> tuple[R, ...]:
            async for item in items:
                return (item,)
            return ()

        async def end() -> None:
            await items.aclose()  # type: ignore[attr-defined]  # they are generators

        items = self.wait_for(start)
        try:
            while found := self.wait_for(following):
                yield found[0]
        finally:
            if self._loop is not None:
                self.wait_for(end)


class _Handle(Generic[Inner]):
    """Something of the asynchronous façade, with the calls that bring it here."""

    def __init__(self, inner: Inner, calls: _Calls) -> None:
        self._inner = inner
        self._calls = calls

    def __repr__(self) -> str:
        return repr(self._inner)


def _blocking(
    method: Callable[Concatenate[Inner, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[_Handle[Inner], P], R]:
    """The same method without `await`."""

    @functools.wraps(method)
    def call(self: _Handle[Inner], /, *args: P.args, **kwargs: P.kwargs) -> R:
        bound: Callable[P, Coroutine[Any, Any, R]] = getattr(self._inner, method.__name__)
        return self._calls.wait_for(lambda: bound(*args, **kwargs))

    return call


def _plain_iterator(
    method: Callable[Concatenate[Inner, P], AsyncIterator[R]],
) -> Callable[Concatenate[_Handle[Inner], P], Iterator[R]]:
    """The same method with a plain iterator."""

    @functools.wraps(method)
    def call(self: _Handle[Inner], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        bound: Callable[P, AsyncIterator[R]] = getattr(self._inner, method.__name__)
        return self._calls.each(lambda: bound(*args, **kwargs))

    return call


class BlockingTerminal(_Handle[Terminal]):
    """A two-way byte stream. As a context manager it detaches at the end."""

    read = _blocking(Terminal.read)
    write = _blocking(Terminal.write)
    resize = _blocking(Terminal.resize)
    close = _blocking(Terminal.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class BlockingConnection(_Handle[Connection]):
    """A two-way byte stream. As a context manager it is closed at the end."""

    read = _blocking(Connection.read)
    write = _blocking(Connection.write)
    end = _blocking(Connection.end)
    close = _blocking(Connection.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Vm(_Handle[AsyncVm]):
    """A handle to one VM; see `platform/api.py`. It follows the VM by id, so it survives a rename."""

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def name(self) -> str:
        return self._inner.name

    info = _blocking(AsyncVm.info)
    start = _blocking(AsyncVm.start)
    stop = _blocking(AsyncVm.stop)
    restart = _blocking(AsyncVm.restart)
    pause = _blocking(AsyncVm.pause)
    resume = _blocking(AsyncVm.resume)
    suspend = _blocking(AsyncVm.suspend)
    rm = _blocking(AsyncVm.rm)
    rename = _blocking(AsyncVm.rename)
    set = _blocking(AsyncVm.set)
    wait = _blocking(AsyncVm.wait)
    copy_to = _blocking(AsyncVm.copy_to)
    copy_from = _blocking(AsyncVm.copy_from)
    logs = _plain_iterator(AsyncVm.logs)
    screenshot = _blocking(AsyncVm.screenshot)
    type = _blocking(AsyncVm.type)
    key = _blocking(AsyncVm.key)
    ports = _blocking(AsyncVm.ports)
    publish = _blocking(AsyncVm.publish)
    unpublish = _blocking(AsyncVm.unpublish)
    stats = _blocking(AsyncVm.stats)
    disks = _blocking(AsyncVm.disks)
    disk_add = _blocking(AsyncVm.disk_add)
    disk_rm = _blocking(AsyncVm.disk_rm)
    disk_resize = _blocking(AsyncVm.disk_resize)
    shares = _blocking(AsyncVm.shares)
    share_add = _blocking(AsyncVm.share_add)
    share_rm = _blocking(AsyncVm.share_rm)
    net_attach = _blocking(AsyncVm.net_attach)
    net_set = _blocking(AsyncVm.net_set)
    net_detach = _blocking(AsyncVm.net_detach)
    net_impair = _blocking(AsyncVm.net_impair)
    net_capture = _plain_iterator(AsyncVm.net_capture)
    snapshot = _blocking(AsyncVm.snapshot)
    history = _blocking(AsyncVm.history)
    restore = _blocking(AsyncVm.restore)
    forget = _blocking(AsyncVm.forget)
    diff = _blocking(AsyncVm.diff)
    backup = _blocking(AsyncVm.backup)
    export = _blocking(AsyncVm.export)

    def fork(self, count: int = 1, *, name: str | None = None, report: Report | None = None) -> Copies:
        """Running copies of this instant, their memory shared until it is written; this one runs on."""
        made = self._calls.wait_for(lambda: self._inner.fork(count, name=name, report=report))
        return Copies(Vm(vm, self._calls) for vm in made)

    def clone(self, name: str | None = None, *, full: bool = False, report: Report | None = None) -> "Vm":
        """A stopped VM with this one's disks as they are now; with `full` it shares nothing with it."""
        return Vm(self._calls.wait_for(lambda: self._inner.clone(name, full=full, report=report)), self._calls)

    def exec(
        self,
        command: Sequence[str] | ExecRequest,
        *,
        stdin: bytes | Iterable[bytes] | None = None,
        on_stdout: ByteSink | None = None,
        on_stderr: ByteSink | None = None,
    ) -> ExecResult:
        """Run a command in the guest. With sinks the output goes there as it comes, and isn't in the result.

        `stdin` may be an iterable, or a file open for reading bytes. Raises `TimedOut` after the request's timeout
        (the command is killed), `GuestFailed` without an agent.
        """
        source = stdin if stdin is None or isinstance(stdin, bytes) else _in_pieces(stdin)
        run = functools.partial(self._inner.exec, command, stdin=source, on_stdout=on_stdout, on_stderr=on_stderr)
        return self._calls.wait_for(run)

    def shell(self, command: Sequence[str] = (), *, user: str | None = None) -> BlockingTerminal:
        """A terminal with a login shell, or `command`, in it."""
        opened = self._calls.wait_for(lambda: self._inner.shell(command, user=user))
        return BlockingTerminal(opened, self._calls)

    def console(self) -> BlockingTerminal:
        """The guest's serial line."""
        return BlockingTerminal(self._calls.wait_for(self._inner.console), self._calls)

    def connect(self, port: int) -> BlockingConnection:
        """A TCP connection to a port of the guest, published or not."""
        return BlockingConnection(self._calls.wait_for(lambda: self._inner.connect(port)), self._calls)

    def vnc(self) -> BlockingConnection:
        """Its display, as VNC viewers speak it (RFB)."""
        return BlockingConnection(self._calls.wait_for(self._inner.vnc), self._calls)


async def _in_pieces(source: Iterable[bytes]) -> AsyncIterator[bytes]:
    """What a blocking iterable or a file gives, read in a worker thread. A file's lines can be endless: read it."""
    read = getattr(source, "read", None)
    pieces = iter(functools.partial(read, _PIECE), b"") if read is not None else iter(source)
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


class Images(_Handle[AsyncImages]):
    """The images of a host; see `platform/api.py`."""

    ls = _blocking(AsyncImages.ls)
    show = _blocking(AsyncImages.show)
    build = _blocking(AsyncImages.build)
    pull = _blocking(AsyncImages.pull)
    import_file = _blocking(AsyncImages.import_file)
    create = _blocking(AsyncImages.create)
    tag = _blocking(AsyncImages.tag)
    rm = _blocking(AsyncImages.rm)
    prune = _blocking(AsyncImages.prune)
    catalogue = _blocking(AsyncImages.catalogue)


class Operations(_Handle[AsyncOperations]):
    """The journal of a host; see `platform/api.py`."""

    ls = _blocking(AsyncOperations.ls)
    show = _blocking(AsyncOperations.show)
    cancel = _blocking(AsyncOperations.cancel)
    retry = _blocking(AsyncOperations.retry)


class Pools(_Handle[AsyncPools]):
    """Copies of snapshots that wait; see `platform/api.py`."""

    ls = _blocking(AsyncPools.ls)
    fill = _blocking(AsyncPools.fill)
    rm = _blocking(AsyncPools.rm)

    def take(self, snapshot: str, name: str) -> Vm:
        """Let one go on, under this name. Raises `NotFound` when none waits."""
        return Vm(self._calls.wait_for(lambda: self._inner.take(snapshot, name)), self._calls)


class Groups(_Handle[AsyncGroups]):
    """Security groups; see `platform/api.py`."""

    ls = _blocking(AsyncGroups.ls)
    show = _blocking(AsyncGroups.show)
    create = _blocking(AsyncGroups.create)
    set = _blocking(AsyncGroups.set)
    rm = _blocking(AsyncGroups.rm)


class Networks(_Handle[AsyncNetworks]):
    """The networks of a host; see `platform/api.py`."""

    @property
    def groups(self) -> Groups:
        return Groups(self._inner.groups, self._calls)

    ls = _blocking(AsyncNetworks.ls)
    show = _blocking(AsyncNetworks.show)
    create = _blocking(AsyncNetworks.create)
    exec = _blocking(AsyncNetworks.exec)
    command_line = _blocking(AsyncNetworks.command_line)
    rm = _blocking(AsyncNetworks.rm)


class Backups(_Handle[AsyncBackups]):
    """Folders of backups; see `platform/api.py`."""

    ls = _blocking(AsyncBackups.ls)
    unreadable = _blocking(AsyncBackups.unreadable)
    show = _blocking(AsyncBackups.show)
    verify = _blocking(AsyncBackups.verify)
    prune = _blocking(AsyncBackups.prune)

    def restore(
        self,
        folder: str | Path,
        backup: str | None = None,
        name: str | None = None,
        *,
        report: Report | None = None,
    ) -> Vm:
        """A new, stopped VM; named as it was, unless `name` says otherwise. All is verified while it is copied."""
        restore = functools.partial(self._inner.restore, folder, backup, name, report=report)
        return Vm(self._calls.wait_for(restore), self._calls)


class Host(_Handle[AsyncHost]):
    """A computer that runs VMs; see `platform/api.py`. It is open inside its `with` block."""

    def __init__(self, inner: AsyncHost) -> None:
        super().__init__(inner, _Calls())

    @property
    def images(self) -> Images:
        return Images(self._inner.images, self._calls)

    @property
    def operations(self) -> Operations:
        return Operations(self._inner.operations, self._calls)

    @property
    def pools(self) -> Pools:
        return Pools(self._inner.pools, self._calls)

    @property
    def networks(self) -> Networks:
        return Networks(self._inner.networks, self._calls)

    @property
    def backups(self) -> Backups:
        return Backups(self._inner.backups, self._calls)

    def __enter__(self) -> Self:
        self._calls.open()
        try:
            self._calls.wait_for(self._inner.__aenter__)
        except BaseException:
            self._calls.close()
            raise
        return self

    def __exit__(self, *exc: object) -> Literal[False]:
        try:
            self._calls.wait_for(lambda: self._inner.__aexit__(*exc))
        finally:
            self._calls.close()
        return False

    ls = _blocking(AsyncHost.ls)
    stop_all = _blocking(AsyncHost.stop_all)
    memory = _blocking(AsyncHost.memory)
    prune = _blocking(AsyncHost.prune)
    fsck = _blocking(AsyncHost.fsck)
    diff = _blocking(AsyncHost.diff)
    export = _blocking(AsyncHost.export)
    events = _plain_iterator(AsyncHost.events)
    audit = _plain_iterator(AsyncHost.audit)

    def get(self, reference: str) -> Vm:
        """The VM with that name, id, or unique prefix of either. Raises `NotFound`."""
        return Vm(self._calls.wait_for(lambda: self._inner.get(reference)), self._calls)

    def create(self, image: str | CreateRequest, *, report: Report | None = None, **options: object) -> Vm:
        """A stopped VM. `options` are the fields of `CreateRequest`: `host.create("tiny", name="v1", cpus=2)`."""
        create = functools.partial(self._inner.create, image, report=report, **options)
        return Vm(self._calls.wait_for(create), self._calls)

    def run(
        self,
        image: str | CreateRequest,
        *,
        report: Report | None = None,
        timeout: float | None = None,
        **options: object,
    ) -> Vm:
        """Create, start, and wait (at most `timeout` seconds) until it is ready (it runs, where there is no agent)."""
        run = functools.partial(self._inner.run, image, report=report, timeout=timeout, **options)
        return Vm(self._calls.wait_for(run), self._calls)

    def clone(self, source: str, name: str | None = None, *, full: bool = False, report: Report | None = None) -> Vm:
        """A stopped VM with the disks of a VM (`web`) or of a snapshot (`web@clean`, or its id)."""
        clone = functools.partial(self._inner.clone, source, name, full=full, report=report)
        return Vm(self._calls.wait_for(clone), self._calls)

    def fork(self, source: str, count: int = 1, *, name: str | None = None, report: Report | None = None) -> Copies:
        """Running copies of a VM (`web`), or of a snapshot with memory (`web@clean`, or its id)."""
        made = self._calls.wait_for(lambda: self._inner.fork(source, count, name=name, report=report))
        return Copies(Vm(vm, self._calls) for vm in made)

    def import_bundle(self, path: BundleFile, name: str | None = None, *, report: Report | None = None) -> Vm:
        """A stopped VM of a bundle, with what was exported as a snapshot in its history."""
        made = self._calls.wait_for(lambda: self._inner.import_bundle(path, name, report=report))
        return Vm(made, self._calls)

    def notices(self) -> list[str]:
        """What recovery did to operations that a killed process had left, told once."""
        return self._inner.notices()


__all__ = [
    "Backups",
    "BlockingConnection",
    "BlockingTerminal",
    "Groups",
    "Host",
    "Images",
    "Networks",
    "Operations",
    "Pools",
    "Vm",
]
