"""Exchanges with a VM's guest agent, one process at a time.

When no host is connected, the agent reads the end of its file again and again, with a sleep of 100 ms in between (its
`ga_channel_read`), and so it takes up to 100 ms to notice a new connection. Therefore a process keeps its connection
for a moment after an exchange, and lets go at once when another process wants it: that one touches the lock file,
which is an event.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from weakref import WeakKeyDictionary

from asyncinotify import Inotify, Mask

from atoll.errors import Busy, GuestFailed
from atoll.host import sockets
from atoll.host.files import locked
from atoll.layout import VmPaths
from atoll.operations.guest_knock import stop_knocking
from atoll.operations.guest_settle import settle
from atoll.qemu.guest import Agent, Refused, conversation

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05
LINGER = 2.0
"""Seconds for which an unused connection is kept."""


class _Line:
    """This process's way to one VM's agent: a connection that is made, kept and given up as needed."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._open: contextlib.AsyncExitStack | None = None
        self._agent: Agent | None = None
        self._wanted: Inotify | None = None
        self._lingering: asyncio.Task[None] | None = None

    async def take(self, paths: VmPaths, name: str, *, timeout: float) -> Agent:
        try:
            await self._stop_lingering()
            if self._agent is not None:
                await self._agent.synchronise(timeout=timeout)
                return self._agent
        except GuestFailed:
            # That QEMU is gone; there may be a new one.
            await self.drop()
        except BaseException:
            # Nobody would notice any more that others want it.
            await self.drop()
            raise
        stop_knocking()
        async with contextlib.AsyncExitStack() as stack:
            lock = paths.lock("agent")
            if not await stack.enter_async_context(held(lock, timeout=timeout + 30, ask=lambda: _touch(lock))):
                raise Busy(f"{name}: the guest agent is in use by other commands", next_step="Try again.")
            self._wanted = stack.enter_context(Inotify())
            self._wanted.add_watch(lock, Mask.ATTRIB)
            self._agent = await stack.enter_async_context(conversation(connect(paths, name, "agent"), timeout=timeout))
            await settle(paths, self._agent)
            self._open = stack.pop_all()
        return self._agent

    async def _stop_lingering(self) -> None:
        if self._lingering is not None:
            lingering, self._lingering = self._lingering, None
            lingering.cancel()
            # Until it has let go of its descriptor: if that was closed before, another one of its number would suffer.
            try:
                await asyncio.wait([lingering])
            except asyncio.CancelledError:
                await asyncio.wait([lingering])
                raise

    async def give_up(self) -> None:
        await self._stop_lingering()
        await self.drop()

    async def drop(self) -> None:
        self._agent = None
        if self._open is not None:
            stack, self._open = self._open, None
            await stack.aclose()

    async def rest(self) -> None:
        """Keep the connection for a moment, unless the caller is being cancelled: then the loop may end."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            await self.drop()
        else:
            self._lingering = asyncio.create_task(self._linger())

    async def _linger(self) -> None:
        assert self._wanted is not None
        given_up = True
        try:
            async with asyncio.timeout(LINGER):
                await self._wanted.get()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            # Taken again, unless the loop ends.
            given_up = self._lingering is asyncio.current_task()
            raise
        finally:
            if given_up:
                await self.drop()


_lines: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Path, _Line]] = WeakKeyDictionary()


@contextlib.asynccontextmanager
async def exchange(paths: VmPaths, name: str, *, timeout: float = 30.0) -> AsyncIterator[Agent]:
    """The agent for a few commands, to oneself. `timeout`, in seconds, is how long it may take to answer.

    QEMU serves one client of the socket at a time, and a second one would wait unseen; so the connection is held by a
    lock, and an exchange should be short. Raises `GuestFailed` when the agent doesn't answer, `Busy` when others don't
    let go of it.
    """
    lines = _lines.setdefault(asyncio.get_running_loop(), {})
    line = lines.setdefault(paths.socket("agent"), _Line())
    async with line.lock:
        agent = await line.take(paths, name, timeout=timeout)
        try:
            yield agent
        except Refused:
            await line.rest()
            raise
        except BaseException:
            # An answer may be under way that nobody waits for.
            await line.drop()
            raise
        await line.rest()


async def let_go(paths: VmPaths) -> None:
    """Give up a connection that is kept: for whoever ends the VM or hands it over."""
    line = _lines.get(asyncio.get_running_loop(), {}).pop(paths.socket("agent"), None)
    if line is not None:
        async with line.lock:
            await line.give_up()


def connect(paths: VmPaths, name: str, port: str) -> socket.socket:
    """A connection to one of the VM's sockets. Raises `GuestFailed` when there is none, or QEMU doesn't run."""
    try:
        return sockets.connect(paths.socket(port))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise GuestFailed(
            f"{name}: can't reach the guest", f"nobody serves its {port} socket", f"Is it running? `atoll show {name}`"
        ) from error
    except BlockingIOError as error:
        raise Busy(f"{name}: too many wait for its {port} socket", next_step="Try again in a moment.") from error


@contextlib.asynccontextmanager
async def held(path: Path, *, timeout: float, ask: Callable[[], None] = lambda: None) -> AsyncIterator[bool]:
    """An exclusive `flock`, waited for up to `timeout` seconds without blocking others; yields whether it was got.

    A lock's release is no event that could be awaited, so this tries again after short, growing pauses, and calls
    `ask` before each.
    """
    end = time.monotonic() + timeout
    pause = FIRST_PAUSE
    while True:
        with locked(path, wait=False) as got:
            if got or time.monotonic() >= end:
                yield got
                return
        ask()
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE)


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)
