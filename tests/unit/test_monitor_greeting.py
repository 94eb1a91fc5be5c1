"""A monitor's client is greeted, whatever the one before it has left unread."""

import asyncio
import json
import socket

import pytest

from atoll.errors import EngineFailed
from atoll.qemu.monitor import Monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}
EVENT = {"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}}


def lines(*messages: object) -> bytes:
    return b"".join(json.dumps(message).encode() + b"\r\n" for message in messages)


async def engine(server: socket.socket, pieces: list[bytes]) -> None:
    """Sends the pieces one after another, then answers commands, as QEMU's monitor does."""
    server.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=server)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.02)
    # Commands come one at a time, and without a newline.
    while command := await reader.read(65536):
        asked = json.loads(command)
        writer.write(lines({"return": {}} | ({"id": asked["id"]} if "id" in asked else {})))
    writer.close()


@pytest.mark.parametrize(
    "pieces",
    [
        [lines(GREETING)],
        [lines(EVENT, GREETING)],
        [lines({"return": {}}, EVENT), lines(GREETING)],
        [lines(EVENT)[:9], lines(EVENT)[9:], lines(GREETING)[:4], lines(GREETING)[4:]],
    ],
)
async def test_leftovers_are_dropped(pieces: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    serving = asyncio.create_task(engine(theirs, pieces))
    async with Monitor(ours, timeout=5) as monitor:
        assert await monitor.execute("query-status") == {}
    await asyncio.wait_for(serving, 5)


async def test_an_answer_to_the_client_before_is_not_taken_for_ours() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    late = [
        {"return": {"status": "paused"}, "id": "__qmp#00001"},
        {"error": {"desc": "no"}, "id": "__qmp#00002"},
        EVENT,
    ]
    serving = asyncio.create_task(engine(theirs, [lines(GREETING, *late)]))
    async with Monitor(ours, timeout=5) as monitor:
        assert await monitor.execute("query-status") == {}
    await asyncio.wait_for(serving, 5)


async def test_an_end_before_the_greeting_is_told() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.sendall(lines(EVENT))
    theirs.close()
    with pytest.raises(EngineFailed, match="ended before it answered"):
        async with Monitor(ours, timeout=5):
            pass
