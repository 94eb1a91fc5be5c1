"""QMP: commands, replies and events over a connected socket.

`qemu.qmp` speaks the protocol. What it leaves open is closed here: event queues are bounded, and everyone who waits for
an event is woken when QEMU dies.
"""

import asyncio
import contextlib
import socket
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, Self

from qemu.qmp import ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.error import ProtocolError
from qemu.qmp.models import Greeting
from qemu.qmp.protocol import ConnectError, Runstate
from qemu.qmp.qmp_client import NegotiationError

from atoll.errors import EngineFailed, TimedOut

KEPT_EVENTS = 1024
"""How many events a slow reader may have waiting; older ones are dropped and counted."""


class Events:
    """Events of some names, from the moment of subscribing. Bounded; ends with `EngineFailed` when QEMU goes."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._waiting: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._wake = asyncio.Event()
        self._gone = False
        self.dropped = 0

    def put(self, event: dict[str, Any]) -> None:
        if self._names and event.get("event") not in self._names:
            return
        if len(self._waiting) == KEPT_EVENTS:
            self.dropped += 1
        self._waiting.append(event)
        self._wake.set()

    def end(self) -> None:
        self._gone = True
        self._wake.set()

    async def next(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The next event, within `timeout` seconds. Raises `TimedOut`, or `EngineFailed` when QEMU is gone."""
        try:
            async with asyncio.timeout(timeout):
                while not self._waiting:
                    if self._gone:
                        raise EngineFailed(
                            "QEMU ended while an event was awaited", next_step="See `atoll logs --source qemu`."
                        )
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            names = " or ".join(sorted(self._names)) or "an event"
            raise TimedOut(f"QEMU didn't report {names} in {timeout:g} s") from None
        return self._waiting.popleft()


class _Client(QMPClient):
    """Takes from a new connection only what is meant for it.

    QEMU sends a new client what the one before it left unread, before it greets. And a command that the one before it
    gave, or an event of that moment, may be answered after the greeting: seen when a client was killed.
    """

    async def _get_greeting(self) -> Greeting:
        while True:
            # The first line may be the rest of one that was read half.
            with contextlib.suppress(ProtocolError):
                message = await self._recv()
                if "QMP" in message:
                    return Greeting(message)

    async def _negotiate(self) -> None:
        assert self._greeting is not None
        offered = self._greeting.QMP.capabilities
        agreeing = self.make_execute_msg("qmp_capabilities", {"enable": ["oob"] if "oob" in offered else []})
        agreeing["id"] = f"agree-{uuid.uuid4()}"
        await self._send(agreeing)
        # QEMU answers in the order of the commands: after this answer nothing of another client's can come.
        while (answer := await self._recv()).get("id") != agreeing["id"]:
            pass
        if "error" in answer:
            raise NegotiationError("QEMU refused to agree on the protocol", ProtocolError(str(answer["error"])))


class Monitor:
    """One QMP connection. Use it as a context manager; QEMU serves one client per socket at a time."""

    def __init__(self, connection: socket.socket, *, timeout: float = 10.0) -> None:
        """`timeout`, in seconds, bounds the greeting: another client may have the socket, or QEMU may hang."""
        self._connection = connection
        self._timeout = timeout
        self._client = _Client()
        self._client.logger.disabled = True
        self._subscribers: set[Events] = set()
        self._pump: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(self._timeout):
                await self._client.connect(self._connection)
        except TimeoutError:
            self._connection.close()
            raise TimedOut(
                f"QEMU didn't greet in {self._timeout:g} s",
                "it hangs, or another program holds its monitor",
                "Try again.",
            ) from None
        except (ConnectError, QMPError, OSError) as error:
            self._connection.close()
            raise EngineFailed("QEMU ended before it answered", str(error)) from error
        except BaseException:
            self._connection.close()
            raise
        self._pump = asyncio.create_task(self._deliver())
        self._watch = asyncio.create_task(self._wake_at_end())
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in (self._pump, self._watch):
            if task is not None:
                task.cancel()
        with contextlib.suppress(Exception):
            await asyncio.shield(asyncio.wait_for(self._client.disconnect(), 5))
        self._end_subscribers()

    async def _deliver(self) -> None:
        async for event in self._client.events:
            for subscriber in self._subscribers:
                subscriber.put(dict(event))

    async def _wake_at_end(self) -> None:
        # The library's listeners don't wake when the connection ends, its state does.
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._end_subscribers()

    def _end_subscribers(self) -> None:
        for subscriber in self._subscribers:
            subscriber.end()

    @contextlib.asynccontextmanager
    async def events(self, names: Iterable[str] = ()) -> AsyncIterator[Events]:
        """Subscribe to events by name, to all without one. Subscribe before the command that causes them."""
        subscriber = Events(frozenset(names))
        self._subscribers.add(subscriber)
        if self._client.runstate is not Runstate.RUNNING:
            subscriber.end()
        try:
            yield subscriber
        finally:
            self._subscribers.discard(subscriber)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 60.0) -> Any:
        """Run a QMP command. Raises `EngineFailed` with QEMU's words, or `TimedOut`."""
        message = Message({"execute": command})
        if arguments:
            message["arguments"] = arguments
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute_msg(message)
        except TimeoutError:
            raise TimedOut(f"QEMU didn't answer {command} in {timeout:g} s") from None
        except ExecuteError as error:
            raise EngineFailed(f"QEMU refused {command}", str(error)) from error
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise EngineFailed(f"QEMU ended during {command}", str(error)) from error

    async def send_descriptor(self, command: str, arguments: dict[str, Any], descriptor: int) -> Any:
        """Run a command that takes a file descriptor (`add-fd`, `getfd`) with it, by SCM_RIGHTS."""
        self._client.send_fd_scm(descriptor)
        return await self.execute(command, arguments)
