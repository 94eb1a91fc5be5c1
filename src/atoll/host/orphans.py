"""Programs that a killed Atoll had started, and that work on."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

ENDING_TIME = 10.0
"""Seconds that killed processes have to be gone in."""


def end_orphans_of(folder: Path) -> None:
    """Kill the groups of our user's programs whose command line names this folder, and wait until they are gone.

    The folder's name is nobody else's. `process.run` makes each program the leader of a group.
    """
    groups = {number for number in _our_processes() if number == _group_of(number) and _names(number, folder)}
    members = [number for number in _our_processes() if _group_of(number) in groups]
    watched = select.poll()
    with contextlib.ExitStack() as stack:
        left = set()
        for number in members:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(number)
                stack.callback(os.close, descriptor)
                watched.register(descriptor, select.POLLIN)
                left.add(descriptor)
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        deadline = time.monotonic() + ENDING_TIME
        while left and (seconds := deadline - time.monotonic()) > 0:
            for descriptor, _ in watched.poll(seconds * 1000):
                watched.unregister(descriptor)
                left.discard(descriptor)


def _our_processes() -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                found.append(int(entry.name))
    return found


def _group_of(number: int) -> int | None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getpgid(number)
    return None


def _names(number: int, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.fsencode(folder) in Path(f"/proc/{number}/cmdline").read_bytes()
    return False
