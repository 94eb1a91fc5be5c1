"""WebSockets for what goes on in a guest: commands with their streams, shells, and the serial line."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from litestar import WebSocket, websocket
from litestar.exceptions import WebSocketDisconnect
from litestar.handlers import WebsocketRouteHandler

from atoll.agent.handlers import Agent
from atoll.agent.problems import problem_of
from atoll.agent.websocket import unless_gone
from atoll.errors import AtollError, InvalidInput
from atoll.model.streams import STDERR, STDOUT, ExecOpening, Resize, ShellOpening, StreamState
from atoll.platform.api import Terminal

Opening = TypeVar("Opening", bound=msgspec.Struct)
Socket = WebSocket[Any, Any, Any]
OPENING_TIMEOUT = 10.0
"""Seconds for the first message."""


def stream_handlers(agent: Agent) -> list[WebsocketRouteHandler]:
    """One for each kind of stream."""

    @websocket("/v1/vms/{vm:str}/exec", name="vm.exec.stream", opt={"scope": "operate"})
    async def execute(socket: Socket, vm: str) -> None:
        await served(socket, lambda: _execute(agent, socket, vm))

    @websocket("/v1/vms/{vm:str}/shell", name="vm.shell.stream", opt={"scope": "operate"})
    async def shell(socket: Socket, vm: str) -> None:
        async def open_it() -> Terminal:
            asked = await _opening(socket, ShellOpening)
            return await (await agent.host.get(vm)).shell(asked.command, user=asked.user)

        await served(socket, lambda: _join(socket, open_it))

    @websocket("/v1/vms/{vm:str}/console", name="vm.console.stream", opt={"scope": "operate"})
    async def console(socket: Socket, vm: str) -> None:
        async def open_it() -> Terminal:
            return await (await agent.host.get(vm)).console()

        await served(socket, lambda: _join(socket, open_it))

    return [execute, shell, console]


async def served(socket: Socket, serve: Callable[[], Awaitable[StreamState]], *, plain: str = "") -> None:
    """Accept, serve, tell the end. A client that goes away ends what it had begun. With a `plain` subprotocol nothing
    is told.
    """
    await socket.accept(subprotocols=plain or None)
    with contextlib.suppress(WebSocketDisconnect):
        try:
            end = await serve()
        except WebSocketDisconnect:
            raise
        except Exception as error:
            end = StreamState(state="ended", error=problem_of(error))
        if not plain:
            await tell(socket, end)
        await socket.close()


async def tell(socket: Socket, state: StreamState) -> None:
    await socket.send_data(msgspec.json.encode(state).decode(), mode="text")


async def _opening(socket: Socket, kind: type[Opening]) -> Opening:
    try:
        async with asyncio.timeout(OPENING_TIMEOUT):
            return msgspec.json.decode(await socket.receive_data(mode="text"), type=kind)
    except (msgspec.DecodeError, TimeoutError) as error:
        raise InvalidInput("the stream can't be opened", str(error) or "its first message didn't come") from error


async def _execute(agent: Agent, socket: Socket, vm: str) -> StreamState:
    asked = await _opening(socket, ExecOpening)
    found = await agent.host.get(vm)
    waiting: list[bytes] = []
    typed: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=4)

    async def standard_input() -> AsyncIterator[bytes]:
        while data := await typed.get():
            yield data

    async def send() -> None:
        while waiting:
            await socket.send_data(waiting.pop(0), mode="binary")

    def sink(channel: int) -> Callable[[bytes], None]:
        return lambda data: waiting.append(bytes([channel]) + data)

    running = asyncio.ensure_future(
        found.exec(
            asked.command,
            stdin=standard_input() if asked.stdin else None,
            on_stdout=sink(STDOUT),
            on_stderr=sink(STDERR),
            drain=send,
        )
    )
    async with _ended_with(socket, running, typed.put):
        result = await running
    await send()
    return StreamState(state="ended", exit_code=result.exit_code)


@contextlib.asynccontextmanager
async def _ended_with(
    socket: Socket, work: "asyncio.Future[Any]", take: Callable[[bytes], Awaitable[None]]
) -> AsyncIterator[None]:
    """Pass on what the client sends, and cancel the work when it goes away."""

    async def listen() -> None:
        try:
            while True:
                await unless_gone(socket, take(await socket.receive_data(mode="binary")))
        except WebSocketDisconnect:
            work.cancel()

    listening = asyncio.create_task(listen())
    try:
        yield
    except asyncio.CancelledError:
        if not listening.done():
            raise
        raise WebSocketDisconnect(detail="the client has gone") from None
    finally:
        listening.cancel()
        work.cancel()
        await asyncio.gather(listening, work, return_exceptions=True)


async def _join(socket: Socket, open_it: Callable[[], Awaitable[Terminal]]) -> StreamState:
    """Both directions of a terminal, until one of them ends."""
    terminal = await unless_gone(socket, open_it())
    try:
        await tell(socket, StreamState(state="open"))
        await _both_ways(socket, terminal)
    finally:
        await terminal.close()
    return StreamState(state="ended", exit_code=getattr(terminal, "exit_code", None))


async def _both_ways(socket: Socket, terminal: Terminal) -> None:
    async def show() -> None:
        while data := await terminal.read():
            await socket.send_data(data, mode="binary")

    async def listen() -> None:
        while True:
            message: Any = await socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(detail="the client has gone")
            if (data := message.get("bytes")) is not None:
                await unless_gone(socket, terminal.write(data))
            elif (text := message.get("text")) is not None:
                size = msgspec.json.decode(text, type=Resize)
                with contextlib.suppress(AtollError):
                    await terminal.resize(rows=size.rows, columns=size.columns)

    both = [asyncio.create_task(show()), asyncio.create_task(listen())]
    try:
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
