"""What a host's agent is asked to do: a request at work, and how it ended. The contract of the HTTP API."""

from typing import Any, Literal

from msgspec import Struct

from atoll.model.operation import Progress

TaskState = Literal["running", "done", "failed", "cancelled", "lost"]
"""`lost`: the agent ended while it ran; the journal (`/v1/operations`) tells what became of it."""


class Problem(Struct, frozen=True, kw_only=True):
    """An error as HTTP carries it (RFC 9457), with the four fields of every error of Atoll's."""

    type: str
    """`urn:atoll:` and the code."""
    title: str
    """What kind of error it is."""
    status: int
    detail: str
    """The whole error in one line."""
    code: str
    """Stable: programs decide by it."""
    what: str
    why: str = ""
    next_step: str = ""


class Task(Struct, frozen=True, kw_only=True):
    """A request that changes something, from its arrival on."""

    id: str
    call: str
    """Which: `vm.start`, `images.pull` …"""
    subject: str
    """What it is about, as the request named it; empty for the host."""
    state: TaskState
    created_at: float
    finished_at: float | None = None
    progress: Progress | None = None
    """The newest."""
    result: Any = None
    """What the call returns, once it is done."""
    error: Problem | None = None
    cancel_requested: bool = False
