"""How much one client may ask of the agent, and what it is told beyond that."""

import asyncio
from typing import Any

import msgspec
import pytest

from atoll.agent import limits
from atoll.agent.limits import Connections, Limited
from atoll.errors import TooMany
from atoll.model.task import Problem


class Waiting:
    """An application whose requests take until they are let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200})


async def ask(app: Limited, principal: str, kind: str = "http", address: str = "") -> dict[str, Any]:
    """The first message of the answer."""
    said: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "more_body": False}

    await app({"type": kind, "state": {"principal": principal}, "client": (address, 1)}, receive, send)
    if said[0].get("status") == 429:
        assert msgspec.json.decode(said[1]["body"], type=Problem).code == "too-many"
    return said[0]


async def test_one_who_has_many_requests_at_work_waits_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "AT_WORK", 3)
    waiting = Waiting()
    app = Limited(waiting)
    running = [asyncio.create_task(ask(app, "ann")) for _ in range(3)]
    await asyncio.sleep(0)
    assert (await ask(app, "ann"))["status"] == 429
    assert (await ask(app, "ann"))["headers"][1] == (b"retry-after", b"1")
    other = asyncio.create_task(ask(app, "ben"))
    waiting.go.set()
    assert {each["status"] for each in await asyncio.gather(*running, other)} == {200}
    assert (await ask(app, "ann"))["status"] == 200


async def test_websockets_are_counted_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAMS", 0)
    waiting = Waiting()
    waiting.go.set()
    app = Limited(waiting)
    assert (await ask(app, "ann", "websocket"))["code"] == 1013
    assert (await ask(app, "ann"))["status"] == 200


async def test_those_that_nobody_knows_are_told_apart_by_where_they_are() -> None:
    waiting = Waiting()
    waiting.go.set()
    app = Limited(waiting, rate=1)
    told = [(await ask(app, "nobody", address="192.0.2.1"))["status"] for _ in range(4)]
    assert told == [200, 200, 429, 429]
    assert (await ask(app, "nobody", address="192.0.2.2"))["status"] == 200


async def test_others_have_their_turn_while_an_answer_of_many_pieces_is_sent() -> None:
    async def ready(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        for _ in range(100):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    answering = asyncio.create_task(ask(Limited(ready), "ann"))
    turns = 0
    while not answering.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 100


def test_tasks_are_limited() -> None:
    limits.check_tasks(limits.TASKS - 1)
    with pytest.raises(TooMany, match="tasks of yours run"):
        limits.check_tasks(limits.TASKS)


def test_the_connection_that_was_idle_the_longest_makes_room() -> None:
    closed: list[str] = []

    class Idle:
        def __init__(self, name: str) -> None:
            self.transport = self
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    connections = Connections(files=2048)
    for name in ("old", "new"):
        connections.idle[Idle(name)] = None  # type: ignore[index]
    connections.make_room(1024)
    assert closed == []
    connections.make_room(1025)
    assert closed == ["old"]
    connections.make_room(1025)
    assert closed == ["old", "new"]
