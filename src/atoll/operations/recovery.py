"""Finishes or undoes the operations that a dead process left (`engine.py`)."""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from atoll.errors import AtollError, NotFound, OperationStuck
from atoll.host import facts
from atoll.model.operation import Operation
from atoll.operations.engine import Context, Verb, drive, final_step, undo_all
from atoll.operations.journal import Journal, this_process
from atoll.operations.services import Services


def abandoned(services: Services) -> list[Operation]:
    """Operations whose process died. A quick look that every command takes."""
    unfinished = services.records.operations(unfinished=True)
    return [operation for operation in unfinished if operation.state != "stuck" and not facts.is_alive(operation.owner)]


async def recover(services: Services, verbs: Mapping[str, Verb[Any]]) -> list[str]:
    """Finish or undo what dead processes left; returns a sentence about each."""
    told = []
    for operation in abandoned(services):
        try:
            told.append(await settle(services, verbs, operation.id, lock_timeout=0.0))
        except OperationStuck as error:
            told.append(error.text)
        except AtollError:
            # Busy: another command is at it, or the subject's owner works; nothing to tell.
            continue
    return [sentence for sentence in told if sentence]


async def settle(
    services: Services,
    verbs: Mapping[str, Verb[Any]],
    operation_id: str,
    *,
    forward: bool = False,
    lock_timeout: float = 10.0,
) -> str:
    """Bring an unfinished operation to its end: forward past the point of no return or when asked, else undone.

    Returns a sentence that tells what was done. Raises `Busy`, `OperationStuck`.
    """
    subject = _reload(services, operation_id)
    async with services.lease(subject.subject, what=subject.subject_name, timeout=lock_timeout):
        operation = _reload(services, operation_id)
        if operation.state in ("done", "undone") or (operation.state != "stuck" and facts.is_alive(operation.owner)):
            return ""
        verb = verbs.get(operation.verb)
        if verb is None:
            raise OperationStuck(
                f"'{operation.verb} {operation.subject_name}' was begun by another version of Atoll",
                "this one doesn't know the verb",
                "Use that version to finish it.",
            )
        context: Context[Any] = Context(
            services=services,
            subject=operation.subject,
            request=msgspec.convert(operation.request, verb.request),
            report=lambda progress: None,
            notes=dict(operation.notes),
        )
        journal = Journal(services, replace(operation, owner=this_process()), context.notes, durable=verb.durable)
        what = f"'{operation.verb} {operation.subject_name}' had been interrupted"
        if forward or final_step(verb, journal) is not None:
            await drive(verb, context, journal)
            outcome, told = "finished", "it was finished"
        else:
            begun = [step for step in verb.steps if journal.state_of(step.name) is not None]
            await undo_all(verb, context, journal, operation.error or "its process died")
            outcome, told = "undone", "it was undone"
            if not any(step.undo for step in begun):
                told = "there was nothing to undo"
        data = {"verb": operation.verb, "operation": operation.id}
        services.records.add_event(
            f"operation.{outcome}", vm_id=operation.subject, name=operation.subject_name, data=data
        )
        return f"{what}; {told}."


def _reload(services: Services, operation_id: str) -> Operation:
    operation = services.records.operation(operation_id)
    if operation is None:
        raise NotFound(f"there is no operation '{operation_id}'", next_step="`atoll operation ls` lists them.")
    return operation
