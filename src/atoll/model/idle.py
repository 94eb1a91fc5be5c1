"""Whether a VM is idle. Pure: readings of what it does go in, a decision comes out."""

from itertools import pairwise

from msgspec import Struct

from atoll.errors import InvalidInput
from atoll.model.units import format_duration, parse_duration

SHARE = 0.1
"""Of one processor's time: who takes less does nothing but wait. Under emulation, where timers cost most, an idle
busybox takes 0.03 (measured); one process that works takes 1.
"""
ALWAYS = 0.9
"""Of the time: a thread that had something to do for longer works, however little of a processor it got."""
FRAMES_A_MINUTE = 20
"""What a card passes though nobody uses it: ARP, router advertisements, renewed leases, clocks that are set."""
SHORTEST, LONGEST = 1.0, 365 * 86400.0
_LOOKS, _SHORTEST_PAUSE, _LONGEST_PAUSE = 6, 10.0, 300.0
_INDEX = 1 << 16
"""What counts a queue's frames begins anew here (virtio, `used.idx`)."""


class Reading(Struct, frozen=True, kw_only=True):
    """One look at a running VM."""

    at: float
    cpu_seconds: float
    """Of its run until now."""
    frames: tuple[int, ...] = ()
    """For each queue of its cards, how many frames it has passed until now."""


def parse(value: str | float) -> float | None:
    """Seconds from `30m`; None from `never`. Raises `InvalidInput`."""
    if value in ("never", 0):
        return None
    seconds = parse_duration(value)
    if not SHORTEST <= seconds <= LONGEST:
        raise InvalidInput(
            f"a VM can't be suspended when it is idle for {format_duration(seconds)}",
            f"the time is from {format_duration(SHORTEST)} to {format_duration(LONGEST)}",
            "Write it like 30m, or never.",
        )
    return seconds


def shown(seconds: float | None) -> str:
    """As `parse` takes it."""
    return "never" if seconds is None else format_duration(seconds)


def with_reading(window: tuple[Reading, ...], now: Reading, *, after: float) -> tuple[Reading, ...]:
    """The readings that matter from now on: one at most is too old. Another run, or another card, begins anew."""
    if window and (len(window[-1].frames) != len(now.frames) or now.cpu_seconds < window[-1].cpu_seconds):
        return (now,)
    kept = (*window, now)
    while len(kept) > 2 and now.at - kept[1].at >= after:
        kept = kept[1:]
    return kept


def is_idle(window: tuple[Reading, ...], *, after: float) -> bool:
    """Whether the readings reach back that far, and tell of nothing but waiting."""
    if len(window) < 2:
        return False
    seconds = window[-1].at - window[0].at
    if seconds < after:
        return False
    passed = sum(
        (there - here) % _INDEX
        for before, now in pairwise(window)
        for here, there in zip(before.frames, now.frames, strict=True)
    )
    took = window[-1].cpu_seconds - window[0].cpu_seconds
    return took <= SHARE * seconds and passed <= FRAMES_A_MINUTE * max(1.0, seconds / 60)


def pause(after: float) -> float:
    """Seconds between two looks at a VM: every 10 or more, but for times so short that those were too few."""
    if after < _LOOKS * _SHORTEST_PAUSE:
        return after / _LOOKS
    return min(max(after / _LOOKS, _SHORTEST_PAUSE), _LONGEST_PAUSE)
