"""Requests at work: each runs on when its client goes, tells its progress, and can be cancelled.

The agent's own file has each of them, too, so that a key finds its result over the agent's end.
"""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
from msgspec.structs import replace

from atoll.agent import logs, traces
from atoll.agent.problems import problem_of
from atoll.agent.state import KeptTask, State
from atoll.errors import Cancelled, InvalidInput, NotFound, WrongState
from atoll.model.names import new_id
from atoll.model.operation import Operation, Progress
from atoll.model.task import Task
from atoll.operations import engine

_log = logging.getLogger("atoll.agent")
KEPT = 1000
"""How many that have ended are kept in memory; all are in the agent's file."""
FORGET_EVERY = 100
"""How many begin between two looks for what the file may forget."""
KEPT_FOR = 24 * 3600.0
"""Seconds for which one can be asked for, and its key be repeated."""

Work = Callable[[Callable[[Progress], None]], Awaitable[Any]]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A request, as far as the list of tasks is concerned."""

    call: str
    subject: str
    principal: str
    """Who asks."""
    key: str | None
    """The client's idempotency key: the same one again is the same request."""
    digest: str
    """Of all that is asked, so that a key isn't used for two things."""


def _witness(operation: Operation) -> None:
    _log.info("%s %s is %s", operation.verb, operation.subject_name, operation.state, extra={"operation": operation.id})
    traces.of_operation(operation)


class _Entry:
    def __init__(self, wanted: Wanted, task: Task) -> None:
        self.wanted = wanted
        self.task = task
        self.work: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()

    def change(self, **changes: Any) -> None:
        self.task = replace(self.task, **changes)
        self.changed.set()
        self.changed = asyncio.Event()


class Tasks:
    """All requests that change something, since the agent began."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._by_key: dict[tuple[str, str], str] = {}
        self._state: State | None = None
        self._begun = 0

    def keep_in(self, state: State) -> None:
        """Let them outlive this agent, and find those of the agents before it."""
        self._state = state
        state.forget_tasks(before=time.time() - KEPT_FOR)

    def begin(self, wanted: Wanted, work: Work) -> Task:
        """Start it, or find the one that the same key began. Raises `InvalidInput` for a key with another request."""
        if wanted.key is not None and (entry := self._of_key(wanted.principal, wanted.key)):
            if entry.wanted.digest != wanted.digest:
                raise InvalidInput(
                    f"the idempotency key {wanted.key!r} was used for another request",
                    next_step="Make a new key for each request; repeat one only with what it was used for.",
                )
            if entry.task.state == "lost":
                raise _lost(entry.task)
            return entry.task
        task = Task(id=new_id(), call=wanted.call, subject=wanted.subject, state="running", created_at=time.time())
        entry = _Entry(wanted, task)
        self._entries[task.id] = entry
        if wanted.key is not None:
            self._by_key[wanted.principal, wanted.key] = task.id
        self._keep(entry)
        self._begun += 1
        entry.work = asyncio.create_task(self._run(entry, work))
        self._drop_oldest()
        return task

    def _keep(self, entry: _Entry) -> None:
        if self._state is not None:
            wanted = entry.wanted
            self._state.put_task(KeptTask(wanted.principal, wanted.key, wanted.digest, entry.task))

    async def _run(self, entry: _Entry, work: Work) -> None:
        wanted = entry.wanted
        logs.about.set(
            {"task": entry.task.id, "call": wanted.call, "subject": wanted.subject, "principal": wanted.principal}
        )
        engine.WITNESS.set(_witness)
        with traces.of_task(wanted.call, task=entry.task.id, subject=wanted.subject, principal=wanted.principal):
            await self._do(entry, work)
        _log.info("%s", entry.task.error.detail if entry.task.error is not None else entry.task.state)

    async def _do(self, entry: _Entry, work: Work) -> None:
        try:
            result = await work(lambda progress: entry.change(progress=progress))
        except (asyncio.CancelledError, Cancelled) as error:
            told = error if isinstance(error, Cancelled) else Cancelled("the request was cancelled", "it was undone")
            entry.change(state="cancelled", error=problem_of(told), finished_at=time.time())
        except Exception as error:
            entry.change(state="failed", error=problem_of(error), finished_at=time.time())
        else:
            entry.change(state="done", result=result, finished_at=time.time())
        self._keep(entry)

    def _drop_oldest(self) -> None:
        if self._state is not None and self._begun % FORGET_EVERY == 0:
            self._state.forget_tasks(before=time.time() - KEPT_FOR)
        ended = [each for each in self._entries.values() if each.task.state != "running"]
        for entry in ended[: max(0, len(ended) - KEPT)]:
            del self._entries[entry.task.id]
            if entry.wanted.key is not None:
                self._by_key.pop((entry.wanted.principal, entry.wanted.key), None)

    def ls(self, principal: str | None = None) -> list[Task]:
        """The newest first."""
        return [
            each.task
            for each in reversed(self._entries.values())
            if principal is None or each.wanted.principal == principal
        ]

    def _of_key(self, principal: str, key: str) -> _Entry | None:
        if known := self._by_key.get((principal, key)):
            return self._entries[known]
        return self._kept(self._state.task_of_key(principal, key)) if self._state is not None else None

    def _of_id(self, task_id: str) -> _Entry | None:
        if entry := self._entries.get(task_id):
            return entry
        return self._kept(self._state.task(task_id)) if self._state is not None else None

    def _kept(self, kept: KeptTask | None) -> _Entry | None:
        """One of the file, where what runs is an earlier agent's."""
        if kept is None or kept.task.created_at < time.time() - KEPT_FOR:
            return None
        task = kept.task
        if task.state == "running":
            task = replace(task, state="lost", progress=None, error=problem_of(_lost(task)))
        wanted = Wanted(
            call=task.call, subject=task.subject, principal=kept.principal, key=kept.key, digest=kept.digest
        )
        return _Entry(wanted, task)

    def running(self, principal: str | None = None) -> int:
        """How many run, for all or for one who asks."""
        return sum(
            each.task.state == "running" and principal in (None, each.wanted.principal)
            for each in self._entries.values()
        )

    def _entry(self, reference: str, principal: str, admin: bool) -> _Entry:
        """Others than admins see their own only."""
        found = self._of_key(principal, reference) or self._of_id(reference)
        if found is None or (found.wanted.principal != principal and not admin):
            raise NotFound(
                f"there is no task {reference!r}",
                f"they are kept for {KEPT_FOR / 3600:g} hours",
                "`GET /v1/operations` has the journal.",
            )
        return found

    def show(self, reference: str, *, principal: str, admin: bool = False) -> Task:
        """By its id, or by the idempotency key that the same principal gave it."""
        return self._entry(reference, principal, admin).task

    async def ended(self, reference: str, *, principal: str, seconds: float, admin: bool = False) -> Task:
        """The task when it has ended, or as it is after `seconds`."""
        entry = self._entry(reference, principal, admin)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while entry.task.state == "running":
                    await entry.changed.wait()
        return entry.task

    async def follow(self, reference: str, *, principal: str, admin: bool = False) -> AsyncGenerator[Task, None]:
        """As it is now, and at each change until it has ended."""
        entry = self._entry(reference, principal, admin)
        while True:
            seen, changed = entry.task, entry.changed
            yield seen
            if seen.state != "running":
                return
            if seen is entry.task:
                await changed.wait()

    def cancel(self, reference: str, *, principal: str, admin: bool = False) -> Task:
        """Ask it to undo what it did; it has ended when its state says so. Raises `WrongState` after its end."""
        entry = self._entry(reference, principal, admin)
        if entry.task.state != "running" or entry.work is None:
            raise WrongState(f"the task {entry.task.id} has ended", f"it is {entry.task.state}")
        if not entry.task.cancel_requested:
            entry.change(cancel_requested=True)
            entry.work.cancel()
        return entry.task

    async def close(self, seconds: float) -> None:
        """Cancel what runs, and wait until it is undone, so long."""
        running = [each.work for each in self._entries.values() if each.work is not None and not each.work.done()]
        for work in running:
            work.cancel()
        if running:
            await asyncio.wait(running, timeout=seconds)


def _lost(task: Task) -> WrongState:
    return WrongState(
        f"the agent ended while the request {task.call} {task.subject} was at work".replace("  ", " "),
        "what it had begun was then finished or undone, and its answer is lost",
        "See `atoll operation ls` (GET /v1/operations) for what became of it; ask again with a new key.",
    )
