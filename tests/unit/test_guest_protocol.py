"""The agent's protocol, spoken with the other end of a socket pair."""

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from atoll.errors import GuestFailed
from atoll.qemu import guest
from atoll.qemu.guest import Refused, UnknownProcess, conversation

Answer = Callable[[dict[str, Any]], bytes]


def told(value: object) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


def refused(words: str) -> bytes:
    return json.dumps({"error": {"class": "GenericError", "desc": words}}).encode() + b"\n"


@asynccontextmanager
async def other_end(answer: Answer) -> AsyncIterator[socket.socket]:
    """A socket whose other end answers syncs as the agent does, and the rest by `answer`."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=theirs, limit=64 << 20)

    async def serve() -> None:
        while line := await reader.readline():
            request = json.loads(line.lstrip(b"\xff"))
            if request["execute"] == "guest-sync-delimited":
                writer.write(b"\xff" + told(request["arguments"]["id"]))
            else:
                writer.write(answer(request))

    task = asyncio.create_task(serve())
    try:
        yield ours
    finally:
        task.cancel()
        writer.close()


async def test_answers_to_others_are_passed_over() -> None:
    def stale_first(request: dict[str, Any]) -> bytes:
        return told({})

    async with other_end(stale_first) as connection:
        connection.setblocking(False)
        async with conversation(connection) as agent:
            await agent.ping()


async def test_stale_replies_before_the_sync_are_dropped() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(told({"pid": 7}) + b"\xff" + told(12345) + b'{"ret')
    asking = asyncio.ensure_future(conversation(ours, timeout=2).__aenter__())
    request = await asyncio.to_thread(theirs.recv, 4096)
    number = json.loads(request.lstrip(b"\xff"))["arguments"]["id"]
    theirs.sendall(b"\xff" + told(number) + told({}))
    agent = await asking
    await agent.ping()
    theirs.close()


async def test_a_guest_that_was_paused_answers_each_sync_before_the_first_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guest, "SYNC_AGAIN", 0.05)
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=theirs)

    async def answer_late() -> None:
        waiting = [await reader.readline() for _ in range(3)]
        while True:
            for line in waiting:
                request = json.loads(line.lstrip(b"\xff"))
                if request["execute"] == "guest-sync-delimited":
                    # The agent's parser tells that it doesn't like the 0xFF.
                    writer.write(refused("JSON parse error, stray") + b"\xff" + told(request["arguments"]["id"]))
                else:
                    writer.write(told({"exited": False}))
            waiting = [await reader.readline()]

    task = asyncio.create_task(answer_late())
    async with conversation(ours, timeout=5) as agent:
        assert not (await agent.status(5)).exited
    task.cancel()
    writer.close()


async def test_a_refusal_says_what_the_agent_said() -> None:
    async with other_end(lambda _: refused("no such thing")) as connection, conversation(connection) as agent:
        with pytest.raises(Refused, match="no such thing"):
            await agent.start("/nope")
        with pytest.raises(UnknownProcess):
            await agent.status(5)
        assert await agent.statuses(5, 6) == [None, None]


async def test_silence_is_told_with_a_next_step() -> None:
    ours, theirs = socket.socketpair()
    with pytest.raises(GuestFailed, match=r"didn't answer in 0\.1 s"):
        async with conversation(ours, timeout=0.1):
            pass
    theirs.close()


async def test_the_end_of_qemu_is_told_at_once() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(GuestFailed, match="QEMU stopped"):
        async with conversation(ours, timeout=30):
            pass


async def test_a_large_reply_comes_whole() -> None:
    output = bytes(range(256)) * (16 << 12)

    def answer(request: dict[str, Any]) -> bytes:
        return told({"exited": True, "exitcode": 0, "out-data": base64.b64encode(output).decode()})

    async with other_end(answer) as connection, conversation(connection) as agent:
        status = await agent.status(1)
        assert status.stdout == output
        assert status.code == 0


async def test_a_signal_becomes_an_exit_code() -> None:
    killed = told({"exited": True, "signal": 9})
    async with other_end(lambda _: killed) as connection, conversation(connection) as agent:
        assert (await agent.status(1)).code == 137
