"""What is written of an operation before each of its steps, and at its end."""

import contextlib
import os
import time
from typing import Any

from msgspec.structs import replace

from atoll.errors import RecordsFailed
from atoll.host import facts
from atoll.model.operation import Operation, Owner, StepRecord, StepState
from atoll.operations.services import Services


class Journal:
    """One operation's record, written at each step."""

    def __init__(self, services: Services, operation: Operation, notes: dict[str, Any], *, durable: bool) -> None:
        self._records = services.records
        self._durable = durable
        self._notes = notes
        self.operation = operation

    def write(self, *, durable: bool = True, **changes: Any) -> None:
        self.operation = replace(self.operation, notes=dict(self._notes), **changes)
        self._records.put_operation(self.operation, durable=durable)

    def try_to_write(self, **changes: Any) -> None:
        """A full disk mustn't keep an undo from what it can do; what isn't written is undone once more later."""
        with contextlib.suppress(RecordsFailed):
            self.write(**changes)

    def marked(self, name: str, state: StepState, error: str = "") -> tuple[StepRecord, ...]:
        kept = [step for step in self.operation.steps if step.name != name]
        return (*kept, StepRecord(name=name, state=state, error=error))

    def intend(self, name: str) -> None:
        done = tuple(replace(step, state="done") if step.state == "intended" else step for step in self.operation.steps)
        self.operation = replace(self.operation, steps=tuple(step for step in done if step.name != name))
        self.write(durable=self._durable, state="running", steps=self.marked(name, "intended"))

    def finish(self) -> None:
        steps = tuple(replace(step, state="done") for step in self.operation.steps)
        self.write(state="done", steps=steps, finished_at=time.time(), error="")

    def state_of(self, name: str) -> StepState | None:
        return next((step.state for step in self.operation.steps if step.name == name), None)


def this_process() -> Owner:
    identity = facts.identity_of(os.getpid())
    assert identity is not None
    return Owner(pid=identity.pid, start_time=identity.start_time, boot_id=identity.boot_id)
