"""A verb at work: its request, its steps and how far it came. Kept in the journal."""

from typing import Any, Literal

from msgspec import Struct, field

OperationState = Literal["running", "done", "undoing", "undone", "stuck"]
StepState = Literal["intended", "done", "undone", "undo-failed"]


class Progress(Struct, frozen=True, kw_only=True):
    """How far one step came. `total` is None while it isn't known."""

    step: str
    done: float = 0
    total: float | None = None
    unit: Literal["bytes", "percent", "steps", "seconds", ""] = ""


class StepRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    state: StepState
    error: str = ""


class Owner(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The process that drives an operation; pid, start time and boot name it for ever."""

    pid: int
    start_time: int
    boot_id: str


class Operation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    verb: str
    subject: str
    """The id of the VM or image it works on; locks are held by it."""
    subject_name: str
    request: dict[str, Any]
    state: OperationState
    owner: Owner
    created_at: float
    steps: tuple[StepRecord, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    """What a step has to remember for the next ones, or for its undo."""
    error: str = ""
    finished_at: float | None = None
    cancel_requested: bool = False
