"""A control group for each VM: what its processes may take of the computer together (cgroups(7)).

Found in this order: the second version where this user may divide its group, else the first version controller by
controller, else nothing. Groups are folders, named `atoll/VM.START` below our own: while a VM is restored it has two
QEMUs for a moment, each with its own.

Memory isn't bounded here: the kernel would count files in memory that QEMU writes for us (templates of forks, a home on
a tmpfs) against the VM, and end it for them.
"""

import contextlib
import os
import secrets
from pathlib import Path

from msgspec import Struct

from atoll.host import kernel

FOLDER = "atoll"
PERIOD = 100_000
"""Microseconds in which a group may take its time: the kernel's default."""


NO_GROUP = "there is no control group that this user may make"


class Wanted(Struct, frozen=True, kw_only=True):
    """Upper bounds for all processes of a VM together."""

    processes: int
    """Threads count as well."""
    cpus: float
    """How many processors' time."""


class Groups(Struct, frozen=True, kw_only=True):
    """What was made: the files that take a pid, and what is bounded."""

    entrances: tuple[str, ...] = ()
    version: int = 0
    bounded: frozenset[str] = frozenset()
    """Of `pids` and `cpu`."""
    why: str = ""
    """What kept the others from being made."""


def make(vm_id: str, wanted: Wanted) -> Groups:
    """Make the groups of one start of a VM. Raises nothing: what isn't bounded is told."""
    name = f"{vm_id}.{secrets.token_hex(4)}"
    mounts, ours = kernel.cgroup_mounts(), kernel.own_groups()
    if "" in mounts and "" in ours:
        groups = _make_second(mounts[""] / ours[""].lstrip("/"), name, wanted)
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
            for file, value in settings:
                (folder / file).write_text(value)
        except OSError as error:
            why = why or f"{folder}: {error.strerror}"
            continue
        # A process that puts its only thread in doesn't wait for all others to stand still, which takes 10 ms (`tasks`
        # in the kernel's cgroup-v1.c).
        entrances.append(str(folder / "tasks"))
        bounded.add(controller)
    return Groups(entrances=tuple(entrances), version=1, bounded=frozenset(bounded), why=why)


def _settings_of_first(wanted: Wanted) -> dict[str, tuple[tuple[str, str], ...]]:
    return {
        "pids": (("pids.max", str(wanted.processes)),),
        "cpu": (("cpu.cfs_quota_us", str(_quota(wanted.cpus))),),
    }


def _make_second(base: Path, name: str, wanted: Wanted) -> Groups:
    folder, controllers = base / FOLDER / name, ("pids", "cpu")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for above in (base, base / FOLDER):
            enabled = set((above / "cgroup.subtree_control").read_text().split())
            lacking = [f"+{each}" for each in controllers if each not in enabled]
            if lacking:
                (above / "cgroup.subtree_control").write_text(" ".join(lacking))
        (folder / "pids.max").write_text(str(wanted.processes))
        (folder / "cpu.max").write_text(f"{_quota(wanted.cpus)} {PERIOD}")
    except OSError as error:
        _remove(folder)
        return Groups(why=f"{error.filename}: {error.strerror}")
    return Groups(entrances=(str(folder / "cgroup.procs"),), version=2, bounded=frozenset(controllers))


def _quota(cpus: float) -> int:
    return round(cpus * PERIOD)


def change_cpus(vm_id: str, cpus: float) -> str:
    """Let a VM that runs take this many processors' time. Returns why it couldn't be, or nothing."""
    ours, found = kernel.own_groups(), False
    try:
        for controller, mount in kernel.cgroup_mounts().items():
            if controller not in ours or controller not in ("", "cpu"):
                continue
            for folder in (mount / ours[controller].lstrip("/") / FOLDER).glob(f"{vm_id}.*"):
                file, text = ("cpu.cfs_quota_us", "") if controller else ("cpu.max", f" {PERIOD}")
                (folder / file).write_text(f"{_quota(cpus)}{text}")
                found = True
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return "" if found else NO_GROUP


def remove(vm_id: str) -> None:
    """Remove the groups of a VM whose processes have ended. One that isn't empty stays until a later call."""
    ours = kernel.own_groups()
    for controller, mount in kernel.cgroup_mounts().items():
        if controller in ours and controller in ("", "pids", "cpu"):
            for folder in (mount / ours[controller].lstrip("/") / FOLDER).glob(f"{vm_id}.*"):
                _remove(folder)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # noqa: PTH106 - a control group's files can't be deleted, and needn't be
        # The last one takes the folder of all along.
        os.rmdir(folder.parent)  # noqa: PTH106
