"""Requests of the agent's over its own end: a key finds its result, and what was lost is told."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from atoll.agent import tasks
from atoll.agent.state import KeptTask, State
from atoll.agent.tasks import Tasks, Wanted
from atoll.errors import InvalidInput, NotFound, WrongState
from atoll.model.operation import Progress

WANTED = Wanted(call="vm.start", subject="web", principal="local", key="k1", digest="d1")
Report = Callable[[Progress], None]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    opened = State(tmp_path / "agent.db")
    yield opened
    opened.close()


def an_agent(state: State) -> Tasks:
    """One after the other, on the same file."""
    found = Tasks()
    found.keep_in(state)
    return found


def returning(value: object) -> Callable[[Report], Awaitable[Any]]:
    async def work(report: Report) -> Any:
        return msgspec.Raw(msgspec.json.encode(value))

    return work


async def never(report: Report) -> Any:
    await asyncio.Event().wait()


async def test_a_key_finds_its_result_after_the_agent_was_killed(state: State) -> None:
    first = an_agent(state)
    task = first.begin(WANTED, returning({"answer": 42}))
    await first.ended(task.id, principal="local", seconds=5)
    await asyncio.sleep(0)
    second = an_agent(state)
    again = second.begin(WANTED, never)
    assert (again.id, again.state, bytes(again.result)) == (task.id, "done", b'{"answer":42}')
    assert second.show("k1", principal="local").id == task.id
    with pytest.raises(InvalidInput, match="used for another request"):
        second.begin(replace(WANTED, digest="d2"), never)
    with pytest.raises(NotFound):
        second.show("k1", principal="somebody else")
    stranger = replace(WANTED, principal="somebody else", key=task.id)
    assert second.begin(stranger, never).id != task.id, "the id of another's task is no key of one's own"


async def test_what_ran_when_the_agent_was_killed_is_lost_and_its_key_refused(state: State) -> None:
    task = an_agent(state).begin(WANTED, never)
    second = an_agent(state)
    found = await second.ended(task.id, principal="local", seconds=5)
    assert found.state == "lost"
    assert found.error is not None and "operation ls" in found.error.next_step
    with pytest.raises(WrongState, match="the agent ended while the request"):
        second.begin(WANTED, never)
    with pytest.raises(WrongState):
        second.cancel(task.id, principal="local")


async def test_a_failed_one_keeps_its_error(state: State) -> None:
    async def fail(report: Report) -> Any:
        raise NotFound("there is no VM 'web'")

    first = an_agent(state)
    task = first.begin(WANTED, fail)
    await first.ended(task.id, principal="local", seconds=5)
    await asyncio.sleep(0)
    found = an_agent(state).show(task.id, principal="local")
    assert found.state == "failed"
    assert found.error is not None and found.error.code == "not-found"


async def test_after_a_day_a_key_is_free_again(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    task = an_agent(state).begin(WANTED, never)
    day_later = time.time() + tasks.KEPT_FOR + 1
    monkeypatch.setattr(time, "time", lambda: day_later)
    assert an_agent(state).begin(WANTED, never).id != task.id


async def test_what_memory_has_no_room_for_is_found_in_the_file(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "KEPT", 2)
    agent = an_agent(state)
    made = []
    for number in range(5):
        made.append(agent.begin(replace(WANTED, key=f"k{number}"), returning(number)))
        await agent.ended(made[-1].id, principal="local", seconds=5)
        await asyncio.sleep(0)
    assert len(agent.ls()) <= 3
    assert agent.show("k0", principal="local").state == "done"


def test_two_writes_are_cheap(state: State) -> None:
    from atoll.model.task import Task

    began = time.perf_counter()
    for number in range(1000):
        task = Task(id=str(number), call="vm.start", subject="web", state="running", created_at=1.0)
        state.put_task(KeptTask("local", str(number), "d", task))
        state.put_task(KeptTask("local", str(number), "d", replace(task, state="done")))
    assert time.perf_counter() - began < 2.0
