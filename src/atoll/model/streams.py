"""What is said on the WebSockets of the HTTP API, beside the bytes themselves.

    exec       client: an `ExecOpening`, then the bytes of standard input, an empty message at its end
               server: the bytes of its outputs, the first byte telling which (1 or 2), then a `StreamState`
    shell      client: a `ShellOpening`, then what is typed, and a `Resize` now and then
    console    client: what is typed at once
               server: a `StreamState` when it is open, the bytes of the terminal, then a `StreamState`

    connect    both: bytes; an empty message says that no more will come from there
    vnc        server: a `StreamState` when it is open, and one at the end. Who asks for the subprotocol `binary`, as
               VNC viewers in browsers do, gets bytes only

Bytes travel in binary messages, the rest is JSON in text messages.
"""

from typing import Literal

from msgspec import Struct

from atoll.model.task import Problem
from atoll.model.vm import ExecRequest

STDOUT, STDERR = 1, 2


class ExecOpening(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    command: ExecRequest
    stdin: bool = False
    """Bytes for it will come."""


class ShellOpening(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    command: tuple[str, ...] = ()
    """A login shell when empty."""
    user: str | None = None


class Resize(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rows: int
    columns: int


class StreamState(Struct, frozen=True, kw_only=True):
    """Where a stream is: the last message of the server's, and the first one of a terminal."""

    state: Literal["open", "ended"]
    exit_code: int | None = None
    error: Problem | None = None
