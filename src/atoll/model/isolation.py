"""What keeps a broken-out guest in: the barriers around an engine process, and which of them hold."""

from typing import Literal

from msgspec import Struct

IsolationLevel = Literal["strict", "standard", "none"]
"""`strict` refuses to start without every barrier, `standard` uses each that the host has, `none` is for debugging."""

BARRIERS: dict[str, str] = {
    "namespaces": "sees no process, network, host name or IPC object but its own",
    "empty root": "sees QEMU's own files only, and can't write to any",
    "own user": "runs as a user that no other program runs as",
    "no privileges": "has no capability, and can't get one",
    "system calls": "can't make sockets, trace, signal, mount, load code into the kernel or start programs",
    "landlock": "opens no file, TCP port, abstract socket or process that it wasn't given",
    "memory limit": "can't take more memory than the guest's and what QEMU needs",
    "process limit": "can't multiply",
    "file limit": "can't make a file larger than its largest disk or memory can be",
}
"""Each barrier's name, and what a program behind it can't do, in the order in which they are told."""


class Barrier(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One barrier of a VM."""

    name: str
    holds: bool
    why: str = ""
    """What it rests on; or, if it doesn't hold, what is missing."""


class Isolation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The barriers around the QEMU of one run."""

    level: IsolationLevel
    user: int | None = None
    """The host's number of the user that it runs as, if that is its own."""
    barriers: tuple[Barrier, ...] = ()

    @property
    def missing(self) -> tuple[Barrier, ...]:
        return tuple(barrier for barrier in self.barriers if not barrier.holds)
