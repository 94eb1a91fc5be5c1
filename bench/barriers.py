"""What confinement costs: starting a small program behind all barriers, behind all but one, and behind none."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec.structs import replace

from atoll.host import cgroups, sandbox
from atoll.host.jail import Jail
from atoll.host.spawn import Program, spawn
from atoll.model.names import new_id
from bench.harness import Case, Goal, Measure

PROGRAM = "/usr/bin/true"
MOST = 10 if os.geteuid() == 0 else 25
"""Milliseconds that all of them may cost."""


def _without_limits(jail: Jail) -> Jail:
    return replace(jail, limits=tuple(each for each in jail.limits if each[0] == resource.RLIMIT_NOFILE), groups=())


LEFT_OUT: dict[str, Callable[[Jail], Jail]] = {
    "nothing": lambda jail: jail,
    "namespaces and empty root": lambda jail: replace(jail, namespaces=False, own_devices=()),
    "own user": lambda jail: replace(jail, ids=None),
    "system calls": lambda jail: replace(jail, filtered=False),
    "landlock": lambda jail: replace(jail, landlock=0),
    "limits": _without_limits,
}


def cases(repetitions: int) -> Iterator[Case]:
    """Each beside the same program with no barrier."""
    for name, change in LEFT_OUT.items():
        yield Case(
            "spawn, all barriers" if name == "nothing" else f"spawn, all but {name}",
            repetitions,
            {"atoll": _confined(change), "raw": lambda: _spawned(None)},
            (Goal("raw", plus=MOST),),
        )


def _confined(change: Callable[[Jail], Jail]) -> Measure:
    def run() -> float:
        vm_id = new_id()
        wanted = sandbox.Wanted(
            id=vm_id, level="standard", memory=1 << 30, threads=258, cpus=2, guest_data=1 << 30
        )  # fmt: skip
        began = time.perf_counter()
        jail, _ = sandbox.prepare(PROGRAM, wanted)
        assert jail is not None
        took = time.perf_counter() - began
        try:
            return took + _spawned(change(jail))
        finally:
            cgroups.remove(vm_id)

    return run


def _spawned(jail: Jail | None) -> float:
    """Seconds until it has become the program."""
    with Path(os.devnull).open("wb") as nothing:
        began = time.perf_counter()
        spawn(Program(argv=(PROGRAM,), descriptors=(), output=nothing.fileno()), jail)
        return time.perf_counter() - began
