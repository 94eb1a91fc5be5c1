"""What the agent writes down about those who ask it for something."""

from typing import Literal

from msgspec import Struct


class AuditEntry(Struct, frozen=True, kw_only=True):
    """One request that changes something, or that was refused."""

    at: float
    principal: str
    """The name of a token; `local` for whoever has the local socket, `nobody` for whoever showed nothing good."""
    via: Literal["local", "remote"]
    address: str
    """Where it came from: an address, or the user and the process at the local socket."""
    call: str
    """`vm.start`, `images.pull` …; the path where there is no such call."""
    subject: str = ""
    """What it is about."""
    task: str = ""
    status: int
    """As HTTP told it: 2xx was done, 202 goes on as the task, 101 is a stream, 401 and 403 were refused."""
    why: str = ""
    """Why it was refused."""
