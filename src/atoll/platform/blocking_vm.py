"""A VM of the façade without `await` (`platform/blocking.py`)."""

import asyncio
import functools
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Self

from atoll.model.vm import ExecRequest, ExecResult
from atoll.platform.api import AsyncVm, ByteSink, Connection, Report, Terminal
from atoll.platform.blocking_calls import Handle, blocking, plain_iterator
from atoll.platform.copies import Copies

_PIECE = 1 << 16


class BlockingTerminal(Handle[Terminal]):
    """A two-way byte stream. As a context manager it detaches at the end."""

    read = blocking(Terminal.read)
    write = blocking(Terminal.write)
    resize = blocking(Terminal.resize)
    close = blocking(Terminal.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class BlockingConnection(Handle[Connection]):
    """A two-way byte stream. As a context manager it is closed at the end."""

    read = blocking(Connection.read)
    write = blocking(Connection.write)
    end = blocking(Connection.end)
    close = blocking(Connection.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Vm(Handle[AsyncVm]):
    """A handle to one VM; see `platform/api.py`. It follows the VM by id, so it survives a rename."""

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def name(self) -> str:
        return self._inner.name

    info = blocking(AsyncVm.info)
    start = blocking(AsyncVm.start)
    stop = blocking(AsyncVm.stop)
    restart = blocking(AsyncVm.restart)
    pause = blocking(AsyncVm.pause)
    resume = blocking(AsyncVm.resume)
    suspend = blocking(AsyncVm.suspend)
    rm = blocking(AsyncVm.rm)
    rename = blocking(AsyncVm.rename)
    set = blocking(AsyncVm.set)
    wait = blocking(AsyncVm.wait)
    copy_to = blocking(AsyncVm.copy_to)
    copy_from = blocking(AsyncVm.copy_from)
    logs = plain_iterator(AsyncVm.logs)
    screenshot = blocking(AsyncVm.screenshot)
    type = blocking(AsyncVm.type)
    key = blocking(AsyncVm.key)
    ports = blocking(AsyncVm.ports)
    publish = blocking(AsyncVm.publish)
    unpublish = blocking(AsyncVm.unpublish)
    stats = blocking(AsyncVm.stats)
    disks = blocking(AsyncVm.disks)
    disk_add = blocking(AsyncVm.disk_add)
    disk_rm = blocking(AsyncVm.disk_rm)
    disk_resize = blocking(AsyncVm.disk_resize)
    shares = blocking(AsyncVm.shares)
    share_add = blocking(AsyncVm.share_add)
    share_rm = blocking(AsyncVm.share_rm)
    net_attach = blocking(AsyncVm.net_attach)
    net_set = blocking(AsyncVm.net_set)
    net_detach = blocking(AsyncVm.net_detach)
    net_impair = blocking(AsyncVm.net_impair)
    net_capture = plain_iterator(AsyncVm.net_capture)
    snapshot = blocking(AsyncVm.snapshot)
    history = blocking(AsyncVm.history)
    restore = blocking(AsyncVm.restore)
    forget = blocking(AsyncVm.forget)
    diff = blocking(AsyncVm.diff)
    backup = blocking(AsyncVm.backup)
    export = blocking(AsyncVm.export)

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
