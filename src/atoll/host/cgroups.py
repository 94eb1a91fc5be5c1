"""A control group for each VM and each network: what its processes may take of the computer together (cgroups(7)).

Found in this order: the second version where this user may divide a group that we are in, else the first version
controller by controller, else nothing. Groups are folders, named `atoll/OWNER.START` below that: while a VM is restored
it has two QEMUs for a moment, each with its own.

A VM's memory isn't bounded here: the kernel would count files in memory that QEMU writes for us (templates of forks, a
home on a tmpfs) against the VM, and end it for them.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from atoll.host import kernel

FOLDER = "atoll"
PERIOD = 100_000
"""Microseconds in which a group may take its time: the kernel's default."""

_ENTRANCES = {
    True: "cgroup.procs",
    # A process that puts its only thread in doesn't wait for all others to stand still, which takes 10 ms (`tasks` in
    # the kernel's cgroup-v1.c).
    False: "tasks",
}
"""By whether the group is of the second version."""
_PAUSE = 0.002
NO_GROUP = "there is no control group that this user may make"


class Wanted(Struct, frozen=True, kw_only=True):
    """Upper bounds for all processes of a VM or a network together."""

    processes: int
    """Threads count as well."""
    cpus: float
    """How many processors' time."""
    weight: int = 100
    """Its share where there isn't enough for all; 100 is the kernel's default."""
    memory: int = 0
    """Bytes; 0 for no bound."""


class Groups(Struct, frozen=True, kw_only=True):
    """What was made: the files that take a pid, and what is bounded."""

    entrances: tuple[str, ...] = ()
    version: int = 0
    bounded: frozenset[str] = frozenset()
    """Of `pids`, `cpu` and `memory`."""
    why: str = ""
    """What kept the others from being made."""


def make(owner: str, wanted: Wanted) -> Groups:
    """Make the groups of one start of a VM or network. Raises nothing: what isn't bounded is told."""
    name = f"{owner}.{secrets.token_hex(4)}"
    mounts, ours = kernel.cgroup_mounts(), kernel.own_groups()
    base = kernel.divisible_group()
    if base is not None:
        groups = _make_second(base, name, wanted)
        if groups.bounded:
            return groups
    entrances: list[str] = []
    bounded: set[str] = set()
    why = "there are no control groups" if not mounts else ""
    for controller, settings in _settings_of_first(wanted).items():
        if controller not in mounts or controller not in ours:
            continue
        folder = mounts[controller] / ours[controller].lstrip("/") / FOLDER / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, value in settings.items():
                (folder / file).write_text(value)
        except OSError as error:
            why = why or f"{folder}: {error.strerror}"
            continue
        entrances.append(str(folder / _ENTRANCES[False]))
        bounded.add(controller)
    return Groups(entrances=tuple(entrances), version=1, bounded=frozenset(bounded), why=why)


def _settings_of_first(wanted: Wanted) -> dict[str, dict[str, str]]:
    shares = wanted.weight * 1024 // 100
    return {
        "pids": {"pids.max": str(wanted.processes)},
        "cpu": {"cpu.cfs_quota_us": str(_quota(wanted.cpus)), "cpu.shares": str(shares)},
        **({"memory": {"memory.limit_in_bytes": str(wanted.memory)}} if wanted.memory else {}),
    }


def _settings_of_second(wanted: Wanted) -> dict[str, dict[str, str]]:
    return {
        "pids": {"pids.max": str(wanted.processes)},
        "cpu": {"cpu.max": f"{_quota(wanted.cpus)} {PERIOD}", "cpu.weight": str(wanted.weight)},
        **({"memory": {"memory.max": str(wanted.memory)}} if wanted.memory else {}),
    }


def _make_second(base: Path, name: str, wanted: Wanted) -> Groups:
    folder = base / FOLDER / name
    try:
        there = (base / "cgroup.controllers").read_text().split()
        settings = {controller: each for controller, each in _settings_of_second(wanted).items() if controller in there}
        if not settings:
            return Groups()
        folder.mkdir(parents=True, exist_ok=True)
        for above in (base, base / FOLDER):
            enabled = set((above / "cgroup.subtree_control").read_text().split())
            lacking = [f"+{each}" for each in settings if each not in enabled]
            if lacking:
                (above / "cgroup.subtree_control").write_text(" ".join(lacking))
        for file, value in (pair for each in settings.values() for pair in each.items()):
            (folder / file).write_text(value)
    except OSError as error:
        _remove(folder)
        return Groups(why=f"{error.filename}: {error.strerror}")
    return Groups(entrances=(str(folder / _ENTRANCES[True]),), version=2, bounded=frozenset(settings))


def _quota(cpus: float) -> int:
    return round(cpus * PERIOD)


def entrances(owner: str) -> tuple[str, ...]:
    """Those of the groups that its last start made, for a process that comes later; none where there are no groups."""
    newest: dict[str, Path] = {}
    for controller, folder in _folders(owner):
        before = newest.get(controller)
        if before is None or before.stat().st_mtime_ns < folder.stat().st_mtime_ns:
            newest[controller] = folder
    return tuple(str(folder / _ENTRANCES[controller == ""]) for controller, folder in newest.items())


def enter(pid: int, entrances: Sequence[str]) -> None:
    """Move a process that runs into a VM's groups. Where the kernel doesn't let us, it stays where it was."""
    for each in entrances:
        with contextlib.suppress(OSError):
            Path(each).write_text(str(pid))


def change_cpus(owner: str, cpus: float) -> str:
    """Let a VM that runs take this many processors' time. Returns why it couldn't be, or nothing."""
    found = False
    try:
        for controller, folder in _folders(owner):
            if controller in ("", "cpu"):
                file, text = ("cpu.cfs_quota_us", "") if controller else ("cpu.max", f" {PERIOD}")
                (folder / file).write_text(f"{_quota(cpus)}{text}")
                found = True
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return "" if found else NO_GROUP


def remove(owner: str, *, within: float = 0.0) -> None:
    """Remove the groups of who has ended; wait this many seconds for processes that are just ending. One that isn't
    empty then stays until a later call.
    """
    deadline = time.monotonic() + within
    while folders := [folder for _, folder in _folders(owner)]:
        for folder in folders:
            _remove(folder)
        if time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE)


def _folders(owner: str) -> Iterator[tuple[str, Path]]:
    """The groups that it has: controller ('' for the second version) and folder."""
    ours, mounts = kernel.own_groups(), kernel.cgroup_mounts()
    above = kernel.groups_above()
    if above:
        # A VM that was started from a desktop is found from another login, too.
        user = os.getuid()
        above.append(mounts[""] / f"user.slice/user-{user}.slice/user@{user}.service")
    places = [("", folder) for folder in dict.fromkeys(above)]
    # A network namespace made by `ip netns` has a /sys of its own, without these mounts.
    first = [each for each in ("pids", "cpu", "memory") if each in ours and each in mounts]
    places += [(each, mounts[each] / ours[each].lstrip("/")) for each in first]
    for controller, place in places:
        for folder in (place / FOLDER).glob(f"{owner}.*"):
            yield controller, folder


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # noqa: PTH106 - a control group's files can't be deleted, and needn't be
        # The last one takes the folder of all along.
        os.rmdir(folder.parent)  # noqa: PTH106
