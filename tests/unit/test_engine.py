"""The journal: every way in which a verb can be broken off, at every step, ends finished or undone, and is told."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import Struct

from atoll.errors import AtollError, Busy, Cancelled, OperationStuck, WrongState
from atoll.layout import Layout
from atoll.operations import engine
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.recovery import recover, settle
from atoll.operations.services import Services


class PourRequest(Struct, frozen=True, kw_only=True):
    folder: str


def _step(name: str, *, final: bool = False) -> Step[PourRequest]:
    """A step that makes a file and an undo that removes it; both may be done again."""

    async def do(context: Context[PourRequest]) -> None:
        (Path(context.request.folder) / name).write_text("done")

    async def undo(context: Context[PourRequest]) -> None:
        (Path(context.request.folder) / name).unlink(missing_ok=True)

    return Step(name, do, undo, final=final)


STEPS = ("one", "two", "three")
POUR = Verb(name="pour", request=PourRequest, steps=(_step("one"), _step("two"), _step("three")))
LAST_IS_FINAL = Verb(name="settle", request=PourRequest, steps=(_step("one"), _step("two", final=True), _step("three")))
VERBS = {"pour": POUR, "settle": LAST_IS_FINAL}


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return Services(Layout(data=tmp_path / "data", cache=tmp_path / "cache", run=tmp_path / "run"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch):
    def arm(*points: tuple[str, str], error: Exception | None = None) -> None:
        def fault(verb: str, step: str, moment: str) -> None:
            if (step, moment) in points:
                raise error or WrongState(f"injected at {step}")

        monkeypatch.setattr(engine, "fault_point", fault)

    return arm


async def pour(services: Services, folder: Path, verb: Verb[PourRequest] = POUR) -> None:
    await perform(verb, PourRequest(folder=str(folder)), services=services, subject="jug", subject_name="jug")


def made(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_a_verb_that_works_is_done_and_journalled(services: Services, folder: Path) -> None:
    await pour(services, folder)
    (operation,) = services.records.operations()
    assert made(folder) == set(STEPS)
    assert operation.state == "done"
    assert [(step.name, step.state) for step in operation.steps] == [(name, "done") for name in STEPS]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_failure_at_any_step_undoes_everything(
    services: Services, folder: Path, fail_at, step: str, moment: str
) -> None:
    fail_at((step, moment))
    with pytest.raises(WrongState, match="injected"):
        await pour(services, folder)
    assert made(folder) == set()
    assert services.records.operations()[0].state == "undone"
    assert services.records.operations(unfinished=True) == []


async def test_an_error_after_the_point_of_no_return_is_stuck_until_retried(
    services: Services, folder: Path, fail_at
) -> None:
    fail_at(("three", "before"))
    with pytest.raises(OperationStuck, match="past the point of no return"):
        await pour(services, folder, LAST_IS_FINAL)
    (operation,) = services.records.operations(unfinished=True)
    assert operation.state == "stuck"
    assert made(folder) == {"one", "two"}
    fail_at()
    assert "finished" in await settle(services, VERBS, operation.id, forward=True)
    assert made(folder) == set(STEPS)


async def test_an_undo_that_fails_leaves_it_stuck_with_two_ways_out(services: Services, folder: Path, fail_at) -> None:
    fail_at(("three", "before"), ("one", "undo"))
    with pytest.raises(OperationStuck, match=r"step 'one': injected at one.*operation cancel.*retry"):
        await pour(services, folder)
    (operation,) = services.records.operations(unfinished=True)
    assert operation.state == "stuck"
    assert {step.name: step.state for step in operation.steps}["one"] == "undo-failed"
    fail_at()
    await settle(services, VERBS, operation.id)
    assert services.records.operation(operation.id).state == "undone"
    assert made(folder) == set()


async def test_a_stuck_undo_can_also_be_taken_forward(services: Services, folder: Path, fail_at) -> None:
    fail_at(("three", "before"), ("one", "undo"))
    with pytest.raises(OperationStuck):
        await pour(services, folder)
    (operation,) = services.records.operations(unfinished=True)
    fail_at()
    await settle(services, VERBS, operation.id, forward=True)
    assert services.records.operation(operation.id).state == "done"
    assert made(folder) == set(STEPS)


async def test_a_cancelled_caller_gets_everything_undone_first(services: Services, folder: Path) -> None:
    started = asyncio.Event()

    async def wait_for_ever(context: Context[PourRequest]) -> None:
        started.set()
        await asyncio.Event().wait()

    slow = Verb(name="pour", request=PourRequest, steps=(*POUR.steps, Step("wait", wait_for_ever)))
    task = asyncio.ensure_future(pour(services, folder, slow))
    await started.wait()
    assert made(folder) == set(STEPS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made(folder) == set()
    assert services.records.operations()[0].state == "undone"


async def test_another_process_can_cancel(services: Services, folder: Path) -> None:
    started = asyncio.Event()

    async def wait_for_ever(context: Context[PourRequest]) -> None:
        started.set()
        await asyncio.Event().wait()

    slow = Verb(name="pour", request=PourRequest, steps=(*POUR.steps, Step("wait", wait_for_ever)))
    task = asyncio.ensure_future(pour(services, folder, slow))
    await started.wait()
    other = Services(services.layout)
    other.records.request_cancel(other.records.operations()[0].id)
    other.close()
    with pytest.raises(Cancelled, match="was undone"):
        await asyncio.wait_for(task, 10)
    assert made(folder) == set()


async def test_two_on_the_same_subject_take_turns_and_give_up_in_time(services: Services, folder: Path) -> None:
    async with services.lease("jug", what="jug"):
        with pytest.raises(Busy, match="jug is busy"):
            await perform(
                POUR,
                PourRequest(folder=str(folder)),
                services=services,
                subject="jug",
                subject_name="jug",
                lock_timeout=0.05,
            )
    await pour(services, folder)


async def test_what_a_living_process_does_is_left_alone(services: Services, folder: Path) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait(context: Context[PourRequest]) -> None:
        started.set()
        await go_on.wait()

    slow = Verb(name="pour", request=PourRequest, steps=(*POUR.steps, Step("wait", wait)))
    task = asyncio.ensure_future(pour(services, folder, slow))
    await started.wait()
    assert await recover(services, VERBS) == []
    go_on.set()
    await task
    assert services.records.operations()[0].state == "done"


KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from atoll.layout import Layout
from atoll.operations import engine
from atoll.operations.services import Services
from tests.unit.test_engine import VERBS, PourRequest

def fault(verb, step, moment):
    if (step, moment) == ({step!r}, {moment!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    if (step, moment) == ({fail!r}, "before"):
        raise ValueError("so that it is undone")

engine.fault_point = fault
services = Services(Layout(data=Path({data!r}), cache=Path({data!r}), run=Path({run!r})))
request = PourRequest(folder={folder!r})
asyncio.run(engine.perform(VERBS[{verb!r}], request, services=services, subject="jug", subject_name="jug"))
"""


def kill_at(services: Services, folder: Path, *, verb: str, step: str, moment: str, fail: str = "") -> None:
    script = KILLED.format(
        root=str(Path(__file__).parents[2]),
        step=step,
        moment=moment,
        fail=fail,
        verb=verb,
        data=str(services.layout.data),
        run=str(services.layout.run),
        folder=str(folder),
    )
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, env=dict(os.environ))
    assert ended.returncode == -9, ended.stderr.decode()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("verb", ["pour", "settle"])
async def test_kill_9_at_any_step_is_settled_by_the_next_command(
    services: Services, folder: Path, verb: str, step: str, moment: str
) -> None:
    kill_at(services, folder, verb=verb, step=step, moment=moment)
    (told,) = await recover(services, VERBS)
    forward = verb == "settle" and step != "one"
    assert told == f"'{verb} jug' had been interrupted; it was {'finished' if forward else 'undone'}."
    assert made(folder) == (set(STEPS) if forward else set())
    assert services.records.operations(unfinished=True) == []
    assert await recover(services, VERBS) == []


@pytest.mark.parametrize("step", STEPS)
async def test_kill_9_in_the_middle_of_an_undo_is_settled_too(services: Services, folder: Path, step: str) -> None:
    kill_at(services, folder, verb="pour", step=step, moment="undo", fail="three")
    (told,) = await recover(services, VERBS)
    assert told.endswith("it was undone.")
    assert made(folder) == set()


async def test_an_unexpected_error_is_told_as_one(services: Services, folder: Path, fail_at) -> None:
    fail_at(("two", "before"), error=ZeroDivisionError("oh"))
    with pytest.raises(AtollError, match="ZeroDivisionError: oh"):
        await pour(services, folder)
    assert made(folder) == set()
