"""What the agent keeps of tasks in its file goes after its time, also when memory keeps the newest only."""

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from atoll.agent import tasks
from atoll.agent.state import KeptTask, State
from atoll.agent.tasks import FORGET_EVERY, KEPT_FOR, Tasks, Wanted
from atoll.model.task import Task


async def nothing(report: object) -> None:
    await asyncio.sleep(0)


async def test_an_old_task_is_forgotten_while_others_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "KEPT", 5)
    with contextlib.closing(State(tmp_path / "agent.db")) as state:
        known = Tasks()
        known.keep_in(state)
        old = Task(id="old", call="vm.start", subject="web", state="done", created_at=time.time() - KEPT_FOR - 1)
        state.put_task(KeptTask("local", None, "", old))
        for number in range(FORGET_EVERY):
            wanted = Wanted(call="vm.start", subject="web", principal="local", key=None, digest=str(number))
            begun = known.begin(wanted, nothing)
            await known.ended(begun.id, principal="local", seconds=5)
        assert state.task("old") is None
        assert len(known.ls()) <= 7
