"""Runs a verb as a journalled list of steps with undo.

    intend 1 ─ do 1 ─ intend 2 ─ do 2 ─ … ─ done          a step that fails, or a cancel, undoes from there back to 1
                         │                                 a step marked `final` is the point of no return: from it on
                         └── kill -9, power cut            only forward; an error there leaves the operation `stuck`

The journal is written before each step (which also says that the steps before it are done) and at the end. So after a
crash the last step may or may not have been done: every `do` and every `undo` is idempotent, and depends on nothing but
the request, the records and the world. `recovery.py` finishes or undoes what a dead process left.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
from msgspec.structs import replace

from atoll.errors import AtollError, Cancelled, OperationStuck, from_os_error
from atoll.model.names import new_id
from atoll.model.operation import Operation, Progress
from atoll.model.requests import check_text
from atoll.model.vm import Vm
from atoll.operations.journal import Journal, this_process
from atoll.operations.services import LOCK_TIMEOUT, Report, Services

R = TypeVar("R", bound=msgspec.Struct)
UNDO_TIMEOUT = 60.0
"""Seconds that one undo may take before the operation counts as stuck."""

fault_point: Callable[[str, str, str], None] = lambda verb, step, moment: None  # noqa: E731
"""Called with moment `before`, `after` or `undo` around each step; tests put failures and kills here."""


@dataclass
class Context(Generic[R]):
    """What a step sees."""

    services: Services
    subject: str
    request: R
    report: Report
    notes: dict[str, Any] = field(default_factory=dict)
    """Results for later steps. Journalled with the next step, so an undo can't count on them."""

    @property
    def vm(self) -> Vm:
        """The VM's record as it is now."""
        return self.services.vm(self.subject)


StepFunction = Callable[[Context[R]], Awaitable[None]]


@dataclass(frozen=True)
class Step(Generic[R]):
    name: str
    do: StepFunction[R]
    undo: StepFunction[R] | None = None
    final: bool = False
    """Once this step is intended, the operation only goes forward."""


@dataclass(frozen=True)
class Verb(Generic[R]):
    name: str
    request: type[R]
    steps: tuple[Step[R], ...]
    durable: bool = True
    """What it intends is safe from a power cut before it is done, not only its end. False where a power cut leaves
    nothing to undo: a step's work is in the computer's memory, in the records, or found as unneeded.
    """


WITNESS: ContextVar[Callable[[Operation], None] | None] = ContextVar("witness", default=None)
"""Is told each operation that has ended, whatever its end."""


async def perform(
    verb: Verb[R],
    request: R,
    *,
    services: Services,
    subject: str,
    subject_name: str,
    report: Report | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
) -> Context[R]:
    """Run a verb under its subject's lock. Raises what a step raised after undoing the steps, or `OperationStuck`."""
    check_text(request)
    async with services.lease(subject, what=subject_name, timeout=lock_timeout):
        context = Context(services=services, subject=subject, request=request, report=report or (lambda progress: None))
        operation = Operation(
            id=new_id(),
            verb=verb.name,
            subject=subject,
            subject_name=subject_name,
            request=msgspec.to_builtins(request),
            state="running",
            owner=this_process(),
            created_at=time.time(),
        )
        journal = Journal(services, operation, context.notes, durable=verb.durable)
        try:
            await drive(verb, context, journal)
        finally:
            if (witness := WITNESS.get()) is not None:
                witness(journal.operation)
        return context


async def drive(verb: Verb[R], context: Context[R], journal: Journal) -> None:
    """Go forward from the first step that isn't done; undo on failure or cancel."""
    forward = asyncio.ensure_future(_forward(verb, context, journal))
    watch = asyncio.ensure_future(_cancel_on_request(context.services, journal, forward))
    try:
        await forward
    except BaseException as error:
        if not forward.done():
            forward.cancel()
            await asyncio.wait([forward])
        await _after_failure(verb, context, journal, error)
    finally:
        watch.cancel()


async def _forward(verb: Verb[R], context: Context[R], journal: Journal) -> None:
    for number, step in enumerate(verb.steps):
        if journal.state_of(step.name) == "done":
            continue
        journal.intend(step.name)
        if number:
            context.report(Progress(step=step.name, done=number, total=len(verb.steps), unit="steps"))
        fault_point(verb.name, step.name, "before")
        await step.do(context)
        fault_point(verb.name, step.name, "after")
    journal.finish()


async def _cancel_on_request(services: Services, journal: Journal, forward: "asyncio.Future[None]") -> None:
    """Cancel when another process asks for it. Short operations end before this starts to look."""
    await asyncio.sleep(0.5)
    from atoll.host.watch import changes

    async for _ in changes(services.layout.wake):
        recorded = services.records.operation(journal.operation.id)
        if recorded is not None and recorded.cancel_requested:
            forward.cancel()
            return


async def _after_failure(verb: Verb[R], context: Context[R], journal: Journal, error: BaseException) -> None:
    told = _told(error, verb.name)
    final = final_step(verb, journal)
    if final is not None:
        journal.try_to_write(state="stuck", error=told.text)
        raise OperationStuck(
            told.what,
            f"{told.why or told.what} (past the point of no return, step '{final}')",
            f"{told.next_step} Then run `atoll operation retry {journal.operation.id[:12]}`.".strip(),
        ) from error
    undo = asyncio.ensure_future(undo_all(verb, context, journal, told.text))
    while not undo.done():
        try:
            await asyncio.shield(undo)
        except asyncio.CancelledError:
            # A second Ctrl-C doesn't stop an undo: each is bounded in time, and half undone is worse.
            if undo.cancelled():
                raise
        except AtollError:
            break
    undo.result()
    if isinstance(error, asyncio.CancelledError) and _asked_by_us():
        raise error
    raise told from error


def _asked_by_us() -> bool:
    """Whether our own task is being cancelled (Ctrl-C), rather than the operation by another process."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _told(error: BaseException, verb: str) -> AtollError:
    if isinstance(error, AtollError):
        return error
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        return Cancelled(f"{verb} was cancelled", "it was undone")
    if isinstance(error, OSError):
        return from_os_error(error, verb)
    return AtollError(f"{verb} failed", f"{type(error).__name__}: {error}", "Set ATOLL_DEBUG=1 to see where.")


def final_step(verb: Verb[R], journal: Journal) -> str | None:
    """The name of the point of no return, if the operation has passed it."""
    for step in verb.steps:
        if step.final and journal.state_of(step.name) in ("intended", "done"):
            return step.name
    return None


async def undo_all(verb: Verb[R], context: Context[R], journal: Journal, why: str) -> None:
    journal.try_to_write(state="undoing", error=why)
    for step in reversed(verb.steps):
        if journal.state_of(step.name) in (None, "undone"):
            continue
        try:
            fault_point(verb.name, step.name, "undo")
            if step.undo is not None:
                await asyncio.wait_for(step.undo(context), UNDO_TIMEOUT)
        except Exception as error:
            said = str(error) or type(error).__name__
            journal.try_to_write(state="stuck", steps=journal.marked(step.name, "undo-failed", said))
            number = journal.operation.id[:12]
            raise OperationStuck(
                f"{verb.name} {journal.operation.subject_name} failed ({why}) and can't be undone",
                f"step '{step.name}': {said}",
                f"Mend that, then `atoll operation cancel {number}` (undo), or `… retry {number}` (go on).",
            ) from error
        journal.operation = replace(journal.operation, steps=journal.marked(step.name, "undone"))
    journal.try_to_write(state="undone", finished_at=time.time())
