"""Which VMs a host's agent starts again, and when. Pure: what ended and what is wanted go in, a decision comes out."""

from typing import Literal

from msgspec import Struct

from atoll.errors import InvalidInput

RestartPolicy = Literal["never", "on-failure", "always"]
"""`on-failure`: when it didn't end because somebody wanted it to; `always`: also when its guest powered itself off."""

EndReason = Literal[
    "guest-shutdown",
    "guest-reset",
    "guest-panic",
    "stopped",
    "killed",
    "crashed",
    "host-rebooted",
    "host-shutdown",
    "start-failed",
    "unknown",
]
"""How a run ended. `host-shutdown`: it was stopped since the computer went down."""

SuspendReason = Literal["asked", "host-shutdown", "idle", "memory"]
"""Why a VM was suspended: somebody wanted it, the computer went down, nobody used it, or memory ran out."""

_BY_ITS_GUEST = frozenset[EndReason]({"guest-shutdown", "guest-reset"})
_WITH_THE_HOST = frozenset[EndReason]({"host-rebooted", "host-shutdown"})

FIRST_DELAY = 1.0
LONGEST_DELAY = 60.0
GOOD_RUN = 60.0
"""Seconds after which a run that ends isn't the fault of the start before it."""
LARGEST_ORDER = 1000


class Attempts(Struct, frozen=True, kw_only=True):
    """How often a VM was started again in a row."""

    count: int = 0
    started_at: float = 0.0
    """When the last of them was."""


def is_restarted(policy: RestartPolicy, reason: EndReason, *, asked: bool, new_boot: bool = False) -> bool:
    """Whether a run that ended so is followed by another one. `asked`: somebody stopped it.

    `new_boot`: the computer has been started since; until then what its shutdown has stopped stays so.
    """
    if policy == "never" or asked or reason == "stopped":
        return False
    if reason == "host-shutdown":
        return new_boot
    return policy == "always" or reason not in _BY_ITS_GUEST


def returns_after_boot(policy: RestartPolicy, reason: EndReason | None, *, asked: bool, autostart: bool) -> bool:
    """Whether a VM that is stopped is started since the computer was."""
    if autostart:
        return True
    return reason in _WITH_THE_HOST and is_restarted(policy, reason, asked=asked, new_boot=True)


def next_attempt(before: Attempts, *, ended_at: float) -> tuple[Attempts, float]:
    """The attempt that follows, and the seconds to wait for it. `started_at` is for who starts it to set."""
    count = 0 if ended_at - before.started_at >= GOOD_RUN else before.count
    return Attempts(count=count + 1, started_at=before.started_at), min(
        FIRST_DELAY * 2.0 ** min(count, 16), LONGEST_DELAY
    )


def check(*, restart: RestartPolicy, boot_order: int, throwaway: bool, suspend_when_idle: float | None = None) -> None:
    """Raises `InvalidInput`."""
    if suspend_when_idle is not None and throwaway:
        raise InvalidInput(
            "--rm and --suspend-when-idle don't go together",
            "the one removes a VM that nobody needs, the other keeps it",
            "Leave one of them away.",
        )
    if restart != "never" and throwaway:
        raise InvalidInput(
            "--rm and --restart don't go together",
            "the one removes a VM that has ended, the other starts it again",
            "Leave one of them away.",
        )
    if not 0 <= boot_order <= LARGEST_ORDER:
        raise InvalidInput(f"{boot_order} is no boot order", f"it is a number from 0 to {LARGEST_ORDER}")
