"""uvicorn's protocol of a WebSocket, which notices that its client has gone also while it is read no further.

A client may send faster than a guest takes it. Then nothing more is read of it, and so neither its answers to pings
nor its end are seen. Hence no pings (TCP asks by itself whether the other computer is there), and a look at the
descriptor now and then.
"""

import asyncio
import select
import socket
from collections.abc import Awaitable
from typing import Any, TypeVar

from litestar import WebSocket
from litestar.exceptions import WebSocketDisconnect
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from atoll.host.sockets import keep_alive

LONGEST_MESSAGE = 1 << 20
"""Bytes of one message of a client."""
LOOK_EVERY = 2.0
"""Seconds between two looks at whether the client is still there."""
LAST_WORDS = 60.0
"""Seconds for a client to take what it was sent before the end; nobody counts it among those at work any more."""
_GONE = "gone"
Done = TypeVar("Done")
_HUNG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class WatchedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket in whose scope's state is an event: that its client has gone."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._gone = asyncio.Event()
        self.app_state = {**self.app_state, _GONE: self._gone}
        self._timer: asyncio.TimerHandle | None = None
        self._looks_since_closed = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        keep_alive(transport.get_extra_info("socket"))
        self._timer = self.loop.call_later(LOOK_EVERY, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.set()
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._gone.set()
        super().shutdown()

    def _look(self) -> None:
        if self.transport.is_closing():
            self._looks_since_closed += 1
        lingers = self._looks_since_closed * LOOK_EVERY > LAST_WORDS
        if lingers or (self.read_paused and hung_up(self.transport.get_extra_info("socket"))):
            self.transport.abort()
            return
        self._timer = self.loop.call_later(LOOK_EVERY, self._look)


def hung_up(connection: socket.socket) -> bool:
    """Whether the other end is closed, though there may be more to read."""
    looking = select.poll()
    looking.register(connection.fileno(), getattr(select, "POLLRDHUP", 0))
    return any(found & _HUNG_UP for _, found in looking.poll(0))


async def unless_gone(socket: "WebSocket[Any, Any, Any]", doing: Awaitable[Done]) -> Done:
    """What is done for a client, for as long as it takes. Raises `WebSocketDisconnect` when it goes meanwhile."""
    work = asyncio.ensure_future(doing)
    gone = asyncio.ensure_future(socket.scope["state"][_GONE].wait())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise WebSocketDisconnect(detail="the client has gone")
        return work.result()
    finally:
        for each in (work, gone):
            each.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
