"""WebSockets that carry a byte stream: TCP ports of guests, and displays. See `model/streams.py`."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from litestar import websocket
from litestar.exceptions import WebSocketDisconnect
from litestar.handlers import WebsocketRouteHandler

from atoll.agent.handlers import Agent
from atoll.agent.streams import Socket, served, tell
from atoll.agent.websocket import unless_gone
from atoll.model.streams import StreamState
from atoll.platform.api import Connection

PLAIN = "binary"
"""The subprotocol of websockify: bytes only."""


def connection_handlers(agent: Agent) -> list[WebsocketRouteHandler]:
    """One for each kind."""

    @websocket("/v1/vms/{vm:str}/connect/{port:int}", opt={"scope": "operate"})
    async def connect(socket: Socket, vm: str, port: int) -> None:
        async def open_it() -> Connection:
            return await (await agent.host.get(vm)).connect(port)

        await _join(socket, open_it)

    @websocket("/v1/vms/{vm:str}/vnc", opt={"scope": "operate"})
    async def vnc(socket: Socket, vm: str) -> None:
        async def open_it() -> Connection:
            return await (await agent.host.get(vm)).vnc()

        await _join(socket, open_it)

    return [connect, vnc]


async def _join(socket: Socket, open_it: Callable[[], Awaitable[Connection]]) -> None:
    plain = PLAIN if PLAIN in socket.scope["subprotocols"] else ""

    async def serve() -> StreamState:
        connection = await unless_gone(socket, open_it())
        try:
            if not plain:
                await tell(socket, StreamState(state="open"))
            await _both_ways(socket, connection, plain=plain)
        finally:
            await connection.close()
        return StreamState(state="ended")

    await served(socket, serve, plain=plain)


async def _both_ways(socket: Socket, connection: Connection, *, plain: str) -> None:
    """Until both sides have said that they are done, or the client has gone."""

    async def outward() -> None:
        while data := await connection.read():
            await socket.send_data(data, mode="binary")
        if not plain:
            await socket.send_data(b"", mode="binary")

    async def inward() -> None:
        while True:
            message: Any = await socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(detail="the client has gone")
            if data := message.get("bytes"):
                await unless_gone(socket, connection.write(data))
            elif not plain:
                await connection.end()
                return

    coming, going = asyncio.create_task(outward()), asyncio.create_task(inward())
    try:
        # A viewer that can't be told of the end by a message is told by the end of the connection.
        await asyncio.wait({coming, going}, return_when=asyncio.FIRST_COMPLETED if plain else asyncio.FIRST_EXCEPTION)
    finally:
        for task in (coming, going):
            task.cancel()
        results = await asyncio.gather(coming, going, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
