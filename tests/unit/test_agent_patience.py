"""Clients that send a body, or take an answer, so slowly that they mean to hold the agent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from litestar.exceptions import HTTPException
from uvicorn.server import ServerState

from atoll.agent import limits, websocket
from atoll.agent.limits import Connections, GuardedProtocol, _timely
from atoll.agent.websocket import WatchedWebSocket


def trickling(pause: float, piece: bytes) -> Callable[[], Any]:
    """A body without end."""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": piece, "more_body": True}

    return receive


async def test_a_body_that_trickles_for_ever_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_PATIENCE", 0.2)
    receive = _timely(trickling(0.01, b"x"))
    async with asyncio.timeout(10):
        with pytest.raises(HTTPException) as refused:
            while True:
                await receive()
    assert refused.value.status_code == 408


async def test_a_body_that_keeps_up_and_an_agent_that_takes_its_time_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_PATIENCE", 0.2)
    large = _timely(trickling(0.05, bytes(1 << 20)))
    for _ in range(10):
        await large()
    slow_agent = _timely(trickling(0.0, b"x"))
    for _ in range(5):
        await slow_agent()
        await asyncio.sleep(0.1)


def noticed(monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> "asyncio.Queue[Exception | None]":
    """The ends of connections."""
    lost: asyncio.Queue[Exception | None] = asyncio.Queue()
    was = kind.connection_lost

    def connection_lost(self: Any, exc: Exception | None) -> None:
        was(self, exc)
        lost.put_nowait(exc)

    monkeypatch.setattr(kind, "connection_lost", connection_lost)
    return lost


@contextlib.asynccontextmanager
async def served(app: Any, folder: Path) -> AsyncIterator[Path]:
    """An application behind the agent's protocols; the path of its socket."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws=WatchedWebSocket)
    config.load()
    state, among, path = ServerState(), Connections(10_000), folder / "socket"
    server = await asyncio.get_running_loop().create_unix_server(
        lambda: among.protocol(config=config, server_state=state, app_state={}), str(path)
    )
    async with server:
        yield path


async def test_who_doesnt_take_a_whole_answer_is_cut_off_and_who_takes_it_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(limits, "_PATIENCE", 0.5)
    monkeypatch.setattr(limits, "_SLOWEST", 1 << 30)
    answer, lost = bytes(4 << 20), noticed(monkeypatch, GuardedProtocol)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]}
        )
        await send({"type": "http.response.body", "body": answer})

    async with served(app, tmp_path) as path:
        reader, writer = await asyncio.open_unix_connection(path, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(10):
            await lost.get()
        writer.close()

        reader, writer = await asyncio.open_unix_connection(path)
        for _ in range(3):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(answer)) == answer
            # It has taken all, so it may be idle.
            await asyncio.sleep(0.3)
        assert lost.empty()
        writer.close()
        await lost.get()


async def test_a_websocket_whose_last_words_nobody_takes_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(websocket, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(websocket, "LAST_WORDS", 0.3)
    lost = noticed(monkeypatch, WatchedWebSocket)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "bytes": bytes(4 << 20)})
        # uvicorn closes behind it, as it does 10 s after a close that isn't answered.

    async with served(app, tmp_path) as path:
        # Never reads more than two bytes.
        _, writer = await asyncio.open_unix_connection(path, limit=1)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        async with asyncio.timeout(10):
            await lost.get()
        writer.close()
