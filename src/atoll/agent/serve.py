"""The agent's process: it listens, serves, and ends in order. A running VM doesn't notice any of that."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal

import msgspec
import uvicorn

from atoll.agent import limits, tls, traces
from atoll.agent.access import Access, Door
from atoll.agent.app import make_app
from atoll.agent.handlers import Agent
from atoll.agent.idle import watch_idleness
from atoll.agent.metrics import Measured
from atoll.agent.pressure import Pressure
from atoll.agent.state import State
from atoll.agent.supervise import supervise
from atoll.agent.transfers import swept
from atoll.agent.websocket import LONGEST_MESSAGE, WatchedWebSocket
from atoll.errors import Busy
from atoll.host import files, page_merging, sockets
from atoll.host.lease import lease
from atoll.host.notify import notify
from atoll.layout import Layout
from atoll.model.names import new_id
from atoll.model.pressure import PressurePolicy
from atoll.operations.promises import Promises
from atoll.platform.local import LocalHost
from atoll.platform.wire import AGENT_HEADER

_log = logging.getLogger("atoll.agent")
CLOSE_TIMEOUT = 60.0
"""Seconds that requests at work have to be undone in when the agent ends."""
GROUP = "atoll"
"""Whose members may use root's agent, as they may root's docker."""


_INSTANCE = new_id()
"""Tells a client whether the agent that it speaks to knows what it asked before."""


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """One way in."""

    socket: socket.socket
    via: Literal["local", "remote"]
    """`local` for the socket, `remote` for the network."""
    shown: str
    tls: ssl.SSLContext | None = None


@contextlib.contextmanager
def listen_locally(layout: Layout) -> Iterator[Listener]:
    """The socket for local commands. Its user may connect; to root's, also the group `atoll` where there is one."""
    files.make_folder(layout.run)
    server = sockets.listen(layout.agent_socket)
    try:
        _open_to_group(layout)
        yield Listener(socket=server, via="local", shown=str(layout.agent_socket))
    finally:
        layout.agent_socket.unlink(missing_ok=True)
        server.close()


def _open_to_group(layout: Layout) -> None:
    layout.agent_socket.chmod(0o600)
    if os.getuid() != 0:
        return
    import grp

    with contextlib.suppress(KeyError):
        os.chown(layout.agent_socket, 0, grp.getgrnam(GROUP).gr_gid)
        layout.agent_socket.chmod(0o660)


@contextlib.asynccontextmanager
async def only_one(layout: Layout) -> AsyncIterator[None]:
    """Hold the agent's lock. Raises `Busy` when another agent serves these VMs."""
    try:
        async with lease(layout.named_lock("agent"), what="the agent", timeout=1.0):
            yield
    except Busy as error:
        raise Busy(
            "an agent serves these VMs already", f"it listens on {layout.agent_socket}", "Use it, or end it first."
        ) from error


@contextlib.asynccontextmanager
async def listen_remotely(
    layout: Layout, addresses: Sequence[str], names: Sequence[str]
) -> AsyncIterator[list[Listener]]:
    """Sockets at these addresses, with TLS."""
    if not addresses:
        yield []
        return
    tls.spare()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(tls.listening(each)) for each in addresses]
        identity = tls.Identity(layout, names)
        await identity.refresh()
        renewing = asyncio.create_task(identity.keep_good())
        stack.callback(renewing.cancel)
        yield [Listener(socket=each, via="remote", shown=tls.shown(each), tls=identity.context) for each in servers]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What may be chosen of an agent."""

    addresses: Sequence[str] = ()
    names: Sequence[str] = ()
    """The computer's, for its certificate."""
    rate: float = limits.RATE
    """Requests that a principal may send in a second."""
    overcommit: float | None = None
    """How many times the computer's memory may be promised; None for no limit."""
    reserve: int | None = None
    """Bytes of its memory that are the computer's own; None for what fits."""
    on_memory_pressure: PressurePolicy = "suspend"
    merge_pages: bool = False
    """The kernel merges equal pages of VMs meanwhile."""

    @property
    def promises(self) -> Promises | None:
        return None if self.overcommit is None else Promises(overcommit=self.overcommit, reserve=self.reserve or 0)


async def serve(layout: Layout, options: Options, *, ready: Callable[[list[str]], None] = lambda shown: None) -> None:
    """Serve until SIGTERM or SIGINT; what is at work then is undone."""
    connections = limits.Connections(limits.raise_file_limit())
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(only_one(layout))
        if said := stack.enter_context(page_merging.merging(layout.page_merging, wanted=options.merge_pages)):
            _log.warning("%s", said)
        stack.enter_context(traces.exported())
        host = await stack.enter_async_context(LocalHost(layout, ends_noticed=True, promises=options.promises))
        state = stack.enter_context(contextlib.closing(State(layout.agent_state)))
        pressure = Pressure(host, policy=options.on_memory_pressure, reserve=options.reserve, tell=_log.warning)
        agent = Agent(host, Access(layout), scraped=pressure.scraped)
        agent.tasks.keep_in(state)
        listeners = [
            stack.enter_context(listen_locally(layout)),
            *await stack.enter_async_context(listen_remotely(layout, options.addresses, options.names)),
        ]
        for told in host.notices():
            _log.warning("%s", told)
        ending = _ending_signals(stack)
        app = limits.Limited(Measured(make_app(agent), agent.meter), rate=options.rate)
        watching = asyncio.create_task(agent.access.watch(_log.warning))
        servers = [_server(Door(app, agent.access, each.via), each, connections) for each in listeners]
        serving = [
            asyncio.create_task(server.serve(sockets=[each.socket]))
            for server, each in zip(servers, listeners, strict=True)
        ]
        await stack.enter_async_context(swept(layout))
        watches = [
            asyncio.create_task(each)
            for each in (
                supervise(host, state, tell=_log.warning),
                pressure.watch(),
                watch_idleness(host, tell=_log.warning),
            )
        ]
        ready([each.shown for each in listeners])
        notify("READY=1")
        ended = asyncio.create_task(ending.wait())
        await asyncio.wait([ended, *serving], return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        notify("STOPPING=1")
        for each in watches:
            each.cancel()
        await asyncio.wait(watches)
        await agent.tasks.close(CLOSE_TIMEOUT)
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        watching.cancel()
        await agent.access.note_uses()


def _ending_signals(stack: contextlib.AsyncExitStack) -> asyncio.Event:
    ending, loop = asyncio.Event(), asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, ending.set)
        stack.callback(loop.remove_signal_handler, each)
    return ending


class _Server(uvicorn.Server):
    """One of several in a process, which has its own handlers of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: Any, listener: Listener, connections: limits.Connections) -> _Server:
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # Whoever says that he passes on another one's request could be anybody.
        proxy_headers=False,
        http=connections.protocol,  # type: ignore[arg-type]  # it is called as a class would be
        headers=[(AGENT_HEADER.decode(), _INSTANCE)],
        timeout_keep_alive=limits.KEEP_ALIVE,
        timeout_graceful_shutdown=5,
        ws=WatchedWebSocket,
        ws_max_size=LONGEST_MESSAGE,
        ws_ping_interval=None,
    )
    config.load()
    config.ssl = listener.tls
    return _Server(config)
