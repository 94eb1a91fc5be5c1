"""A VM's phase and which verbs each phase allows.

           create                start                 guest powers off, stop, kill
    (none) ──────▶ stopped ──────────────▶ running ──────────────────────────────▶ stopped
                      ▲                     │   ▲
                      │               pause ▼   │ resume
                      └──────── stop ────── paused

`starting` is a process that hasn't answered yet; `unknown` is one that can't be reached, and never means stopped.
A phase is observed (process and QMP), never stored: see `operations/observe.py`.
"""

from enum import StrEnum
from typing import Literal

from atoll.errors import WrongState


class Phase(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    """The guest stands still and can go on: somebody paused it, or it waits for room on the host's disk."""
    CRASHED = "crashed"
    """The process lives, the guest doesn't: QEMU reports `internal-error`, `watchdog` or `guest-panicked`."""
    SUSPENDED = "suspended"
    """There is no process; its memory is on the disk, and the next start goes on from it."""
    UNKNOWN = "unknown"


Verb = Literal[
    "start", "stop", "pause", "resume", "rm", "exec", "console", "reset", "hotplug", "snapshot", "suspend", "disk"
]  # fmt: skip

ALLOWED: dict[Verb, frozenset[Phase]] = {
    "start": frozenset({Phase.STOPPED, Phase.SUSPENDED}),
    "stop": frozenset({Phase.RUNNING, Phase.PAUSED, Phase.STARTING, Phase.CRASHED, Phase.UNKNOWN}),
    "pause": frozenset({Phase.RUNNING}),
    "resume": frozenset({Phase.PAUSED}),
    "rm": frozenset({Phase.STOPPED, Phase.SUSPENDED}),
    "exec": frozenset({Phase.RUNNING}),
    "console": frozenset({Phase.RUNNING, Phase.PAUSED, Phase.STARTING, Phase.CRASHED}),
    "reset": frozenset({Phase.RUNNING, Phase.PAUSED, Phase.CRASHED}),
    "hotplug": frozenset({Phase.RUNNING, Phase.PAUSED}),
    "snapshot": frozenset({Phase.STOPPED, Phase.RUNNING, Phase.PAUSED}),
    "suspend": frozenset({Phase.RUNNING, Phase.PAUSED}),
    # Its disks have to stay as its memory knows them.
    "disk": frozenset(Phase) - {Phase.SUSPENDED},
}

# QEMU's RunState (qapi/run-state.json) as a phase.
_RUN_STATES: dict[str, Phase] = {
    "running": Phase.RUNNING,
    "paused": Phase.PAUSED,
    "suspended": Phase.RUNNING,
    "prelaunch": Phase.STARTING,
    "inmigrate": Phase.STARTING,
    "debug": Phase.PAUSED,
    "save-vm": Phase.PAUSED,
    "restore-vm": Phase.PAUSED,
    "finish-migrate": Phase.PAUSED,
    "postmigrate": Phase.PAUSED,
    "colo": Phase.RUNNING,
    "watchdog": Phase.CRASHED,
    "internal-error": Phase.CRASHED,
    "io-error": Phase.PAUSED,
    "guest-panicked": Phase.CRASHED,
    "shutdown": Phase.STOPPED,
}

Trouble = Literal["disk-full", "guest-panic", "internal-error", "watchdog"]
# By QEMU's default only a write for which the host has no space (ENOSPC) stops a guest; it is kept and tried again when
# the guest goes on. Other errors of disks are told to the guest.
_TROUBLES: dict[str, Trouble] = {
    "io-error": "disk-full",
    "guest-panicked": "guest-panic",
    "internal-error": "internal-error",
    "watchdog": "watchdog",
}


def phase_of_run_state(run_state: str) -> Phase:
    """The phase of a QEMU that answered `query-status` with this state."""
    return _RUN_STATES.get(run_state, Phase.UNKNOWN)


def trouble_of_run_state(run_state: str) -> Trouble | None:
    """Why a guest stands still that nobody stopped."""
    return _TROUBLES.get(run_state)


def require(name: str, phase: Phase, verb: Verb) -> None:
    """Raise `WrongState` unless a VM in this phase can do `verb`."""
    if phase in ALLOWED[verb]:
        return
    next_steps = {
        Phase.STOPPED: f"Start it with `atoll start {name}`.",
        Phase.SUSPENDED: f"Let it go on with `atoll resume {name}`, or drop its memory with `atoll stop {name}`.",
        Phase.PAUSED: f"Let it go on with `atoll resume {name}`.",
        Phase.RUNNING: f"Stop it with `atoll stop {name}`." if verb in ("rm", "start") else "",
        Phase.STARTING: f"Wait for it with `atoll wait {name}`.",
        Phase.CRASHED: f"See `atoll logs {name}`, then `atoll restart {name}`.",
        Phase.UNKNOWN: f"See `atoll show {name}`; `atoll stop --force {name}` ends it.",
    }
    if verb == "rm" and phase is not Phase.STOPPED:
        next_steps[phase] = f"Stop it first, or use `atoll rm --force {name}`."
    raise WrongState(f"{name}: can't {verb}", f"it is {phase}", next_steps[phase])
