"""The agent's process: it listens, serves, and ends in order. A running VM doesn't notice any of that."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import uvicorn

from atoll.agent.app import make_app
from atoll.agent.handlers import Agent
from atoll.agent.transfers import swept
from atoll.errors import Busy
from atoll.host import files, sockets
from atoll.host.lease import lease
from atoll.layout import Layout
from atoll.platform.local import LocalHost

CLOSE_TIMEOUT = 60.0
"""Seconds that requests at work have to be undone in when the agent ends."""
GROUP = "atoll"
"""Whose members may use root's agent, as they may root's docker."""


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """One way in."""

    socket: socket.socket
    via: str
    """`local` for the socket, `remote` for the network."""
    certificate: str | None = None
    key: str | None = None


@contextlib.contextmanager
def listen_locally(layout: Layout) -> Iterator[Listener]:
    """The socket for local commands. Its user may connect; to root's, also the group `atoll` where there is one."""
    files.make_folder(layout.run)
    server = sockets.listen(layout.agent_socket)
    try:
        _open_to_group(layout)
        yield Listener(socket=server, via="local")
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


async def serve(layout: Layout, *, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT; what is at work then is undone."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(only_one(layout))
        host = await stack.enter_async_context(LocalHost(layout))
        agent = Agent(host)
        listeners = [stack.enter_context(listen_locally(layout))]
        for told in host.notices():
            sys.stderr.write(f"{told}\n")
        ending = _ending_signals(stack)
        servers = [_server(make_app(agent), listener) for listener in listeners]
        serving = [
            asyncio.create_task(server.serve(sockets=[each.socket]))
            for server, each in zip(servers, listeners, strict=True)
        ]
        await stack.enter_async_context(swept(layout))
        ready()
        ended = asyncio.create_task(ending.wait())
        await asyncio.wait([ended, *serving], return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        await agent.tasks.close(CLOSE_TIMEOUT)
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)


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


def _server(app: Any, listener: Listener) -> _Server:
    async def told_where(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["via"] = listener.via
        await app(scope, receive, send)

    config = uvicorn.Config(
        told_where,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        ssl_certfile=listener.certificate,
        ssl_keyfile=listener.key,
    )
    return _Server(config)
