"""Streams to an agent's guests over WebSockets: commands, shells, and serial lines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import msgspec
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from atoll.errors import NetworkFailed
from atoll.host.sockets import keep_alive
from atoll.model.streams import STDERR, STDOUT, ExecOpening, Resize, ShellOpening, StreamState
from atoll.model.vm import ExecRequest, ExecResult
from atoll.platform import routes
from atoll.platform.api import ByteSink, Drain
from atoll.platform.reach import lost, why_not
from atoll.platform.wire import Wire, error_of, refused

Stdin = bytes | AsyncIterator[bytes] | None
PIECE = 256 << 10
"""Bytes of one message; the agent takes up to four times as much."""


async def open_socket(wire: Wire, path: str) -> ClientConnection:
    """A WebSocket to the agent. Raises `NetworkFailed`, or what the agent says."""
    place = wire.place
    headers = [("Authorization", f"Bearer {place.token}")] if place.token is not None else []
    url = place.url.replace("http", "ws", 1) + routes.VERSION + path
    options: dict[str, Any] = {"additional_headers": headers, "compression": None, "max_size": None, "proxy": None}
    # An agent whose guest takes its time answers no ping meanwhile: TCP tells whether it is there.
    options["ping_interval"] = None
    try:
        if wire.socket is not None:
            return await unix_connect(wire.socket, url, **options)
        connected = await connect(url, ssl=place.tls, **options)
        keep_alive(connected.transport.get_extra_info("socket"))
        return connected
    except InvalidStatus as error:
        raise refused(error.response.status_code, bytes(error.response.body or b"")) from error
    except (OSError, WebSocketException, TimeoutError) as error:
        raise why_not(place.shown, error) from error


def _lost(wire: Wire, error: BaseException) -> NetworkFailed:
    told = error.rcvd.reason if isinstance(error, ConnectionClosed) and error.rcvd is not None else ""
    return lost(wire.place.shown, EOFError(told) if told else error)


async def execute(
    wire: Wire,
    vm_id: str,
    request: ExecRequest,
    *,
    stdin: Stdin = None,
    on_stdout: ByteSink | None = None,
    on_stderr: ByteSink | None = None,
    drain: Drain | None = None,
) -> ExecResult:
    """Run a command in a guest over there; as `AsyncVm.exec`. When this is cancelled, the command is killed."""
    out, err = bytearray(), bytearray()
    sinks: dict[int, Any] = {STDOUT: on_stdout or out.extend, STDERR: on_stderr or err.extend}
    async with await open_socket(wire, f"/vms/{quote(vm_id, safe='')}/exec") as socket:
        opening = ExecOpening(command=request, stdin=stdin is not None)
        await socket.send(msgspec.json.encode(opening).decode())
        sending = asyncio.create_task(_send(socket, stdin))
        try:
            async for message in socket:
                if isinstance(message, str):
                    code = _end(message)
                    return ExecResult(exit_code=code or 0, stdout=bytes(out), stderr=bytes(err))
                sinks[message[0]](message[1:])
                if drain is not None:
                    await drain()
            raise _lost(wire, EOFError("it ended before the command did"))
        except ConnectionClosed as error:
            raise _lost(wire, error) from error
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def _send(socket: ClientConnection, stdin: Stdin) -> None:
    if stdin is None:
        return
    if isinstance(stdin, bytes):
        await _send_all(socket, stdin)
    else:
        async for piece in stdin:
            await _send_all(socket, piece)
    await socket.send(b"")


async def _send_all(socket: ClientConnection, data: bytes) -> None:
    for begin in range(0, len(data), PIECE):
        await socket.send(data[begin : begin + PIECE])


def _end(message: str) -> int | None:
    end = msgspec.json.decode(message, type=StreamState)
    if end.error is not None:
        raise error_of(end.error)
    return end.exit_code


class RemoteTerminal:
    """A shell or a serial line over there (`platform.api.Terminal`)."""

    def __init__(self, wire: Wire, socket: ClientConnection) -> None:
        self._wire = wire
        self._socket = socket
        self.exit_code: int | None = None

    async def read(self) -> bytes:
        try:
            message = await self._socket.recv()
        except ConnectionClosed as error:
            raise _lost(self._wire, error) from error
        if isinstance(message, str):
            self.exit_code = _end(message)
            return b""
        return message

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionClosed):
            await _send_all(self._socket, data)

    async def resize(self, *, rows: int, columns: int) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(msgspec.json.encode(Resize(rows=rows, columns=columns)).decode())

    async def close(self) -> None:
        await self._socket.close()


async def open_shell(wire: Wire, vm_id: str, opening: ShellOpening) -> RemoteTerminal:
    """A terminal with a shell in it."""
    socket = await open_socket(wire, f"/vms/{quote(vm_id, safe='')}/shell")
    await socket.send(msgspec.json.encode(opening).decode())
    return await _opened(wire, socket)


async def open_console(wire: Wire, vm_id: str) -> RemoteTerminal:
    """The serial line."""
    return await _opened(wire, await open_socket(wire, f"/vms/{quote(vm_id, safe='')}/console"))


class RemoteConnection:
    """A byte stream to something over there (`platform.api.Connection`)."""

    def __init__(self, wire: Wire, socket: ClientConnection) -> None:
        self._wire = wire
        self._socket = socket
        self._ended = False

    async def read(self) -> bytes:
        if self._ended:
            return b""
        try:
            message = await self._socket.recv()
        except ConnectionClosed as error:
            raise _lost(self._wire, error) from error
        if isinstance(message, str):
            _end(message)
            message = b""
        self._ended = not message
        return message

    async def write(self, data: bytes) -> None:
        # An empty message, of which this sends none, would say that nothing more comes.
        with contextlib.suppress(ConnectionClosed):
            await _send_all(self._socket, data)

    async def end(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(b"")

    async def close(self) -> None:
        await self._socket.close()


async def open_connection(wire: Wire, path: str) -> RemoteConnection:
    """It, once it is open over there. Raises why it can't be."""
    socket = await open_socket(wire, path)
    try:
        _end(str(await socket.recv()))
    except ConnectionClosed as error:
        raise _lost(wire, error) from error
    except BaseException:
        await socket.close()
        raise
    return RemoteConnection(wire, socket)


async def _opened(wire: Wire, socket: ClientConnection) -> RemoteTerminal:
    """The terminal, once it is open over there. Raises why it can't be."""
    terminal = RemoteTerminal(wire, socket)
    try:
        await terminal.read()
    except BaseException:
        await terminal.close()
        raise
    return terminal
