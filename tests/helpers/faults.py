"""Faults at the steps of verbs: a process that is killed there, a disk that is full."""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from atoll.model.vm import Vm
from atoll.operations import engine
from atoll.operations.boot import engines_of
from atoll.operations.registry import VERBS
from tests.helpers.tool import Point


def points(*verbs: str, moments: tuple[str, ...] = ("before", "after")) -> list[Point]:
    """Before and after each step of these verbs, in order."""
    return [(verb, step.name, moment) for verb in verbs for step in VERBS[verb].steps for moment in moments]


@contextlib.contextmanager
def at(point: Point, fault: Callable[[], object]) -> Iterator[list[Point]]:
    """Let something happen in this process when a verb first gets to the point; the list has it once it has."""
    reached: list[Point] = []

    def look(*here: str) -> None:
        if here == point and not reached:
            reached.append(point)
            fault()

    usual, engine.fault_point = engine.fault_point, look
    try:
        yield reached
    finally:
        engine.fault_point = usual


def kill(pid: int) -> None:
    """SIGKILL, and wait for the end."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [], 10)
    finally:
        os.close(descriptor)


def kill_recorded(vm: Vm) -> None:
    """The one that the VM's record has, if it has one."""
    if vm.run is not None:
        with contextlib.suppress(ProcessLookupError):
            kill(vm.run.pid)


def kill_qemu(vm: Vm) -> None:
    """All that were started for the VM, recorded or not."""
    for pid in engines_of(vm):
        with contextlib.suppress(ProcessLookupError):
            kill(pid)


def fill(filler: Path, *, leave: int = 0) -> None:
    """Take all room of the file system where `filler` is to be, but for some bytes."""
    room = os.statvfs(filler.parent)
    left = room.f_bavail * room.f_frsize - leave
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while left >= size or not leave:
                    left -= file.write(bytes(size))


def children(program: str) -> list[int]:
    """This process's own that run the program."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            first = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
            if parent == os.getpid() and Path(first).name == program:
                found.append(int(entry.name))
    return found
