"""What an agent does when the computer's memory gets short. Pure: what was seen goes in, what to do comes out.

    fine ──── less than the reserve is available ────▶ low
      ◀──── the reserve and a margin are available ────

While it is low, balloons take what guests don't need; when that isn't enough, VMs are suspended to the disk. While it
is fine, balloons are given back, and then those VMs go on, one after the other.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import InvalidInput
from atoll.model.units import GIB, MIB, format_size

PressurePolicy = Literal["suspend", "balloon", "nothing"]
"""What may be done to VMs when memory is short: `suspend` includes `balloon`."""

SMALLEST_FLOOR = 32 * MIB
SMALLEST_MOVE = 4 * MIB
"""What isn't worth to move a balloon for."""
PATIENCE = 3.0
"""Seconds that balloons have to help in, unless memory goes fast."""
CALM = 5.0
"""Seconds between what was done and the next VM that goes on, and between low memory and what is given back."""
RUN_COSTS = 96 * MIB
"""What a QEMU takes besides the memory of its guest."""
IDLE, BUSY = 0.05, 0.5
"""Processors' time a second, below and above which a VM counts as idle and busy."""


class Room(Struct, frozen=True, kw_only=True):
    """The computer's memory; bytes."""

    available: int
    reserve: int
    """What the computer shall have for itself."""
    margin: int
    """How much more than the reserve is enough."""


class Guest(Struct, frozen=True, kw_only=True):
    """A running VM; bytes."""

    id: str
    most: int
    """What its user lets it have."""
    floor: int
    """What its balloon always leaves it."""
    given: int | None = None
    """What its balloon leaves it now. None: it has none that answers."""
    available: int | None = None
    """What it could use of that without freeing anything, as its kernel says. None: it doesn't say."""
    mapped: bool = False
    """Its memory is a file's until it writes it, as a fork's: the computer gets nothing back from its balloon."""
    private: int = 0
    """What the computer gets back when it is suspended."""
    activity: float = 0.0
    """Processors' time that it took in a second."""
    policy: PressurePolicy = "suspend"
    may_sleep: bool = True
    """False for one that is at work with an operation, waits in a pool, or is removed when it has ended."""
    leaving: bool = False
    """It is being suspended, and stands still."""
    moving: bool = False
    """Its balloon was told something a moment ago."""
    unsure: bool = False
    """An agent that is gone may have told its balloon something that it hasn't done yet."""


class Sleeper(Struct, frozen=True, kw_only=True):
    """A VM that was suspended since memory was short."""

    id: str
    since: float
    needs: int
    """Bytes, to go on."""


class State(Struct, frozen=True, kw_only=True):
    """What one look leaves to the next; times are a clock's that doesn't jump."""

    low: bool = False
    since: float = float("-inf")
    acted_at: float = float("-inf")
    """When a VM was suspended, or went on."""


class MoveBalloon(Struct, frozen=True, tag=True):
    id: str
    size: int
    """What the guest is left."""


class Suspend(Struct, frozen=True, tag=True):
    id: str


class GoOn(Struct, frozen=True, tag=True):
    id: str


class Figures(Struct, frozen=True, kw_only=True):
    """What an agent tells of its watch; bytes."""

    reserve: int
    low: bool = False
    held: dict[str, int] = {}
    """What balloons hold back of the memory that VMs were started with, by VM; of those that were asked."""
    used: dict[str, int] = {}
    """What guests need, as they said lately."""
    asleep: int = 0
    """VMs that were suspended since memory was short."""


Act = MoveBalloon | Suspend | GoOn


def default_reserve(total: int) -> int:
    """A sixteenth of the memory."""
    return min(max(total // 16, 256 * MIB), 4 * GIB)


def margin(total: int) -> int:
    return min(max(total // 64, 64 * MIB), 512 * MIB)


def floor_of(memory: int, asked: int | None) -> int:
    """What a VM with that much memory is always left: half of it unless something else was asked for."""
    return min(memory, memory // 2 if asked is None else asked)


def check_floor(memory: int, floor: int | None) -> None:
    """Raises `InvalidInput`."""
    if floor is not None and not min(SMALLEST_FLOOR, memory) <= floor <= memory:
        raise InvalidInput(
            f"a VM with {format_size(memory)} can't be left at least {format_size(floor)}",
            f"it is {format_size(SMALLEST_FLOOR)} to all of its memory",
            "Choose another one with --memory-min.",
        )


def cushion(guest: Guest) -> int:
    """What a guest that works needs to have available."""
    return min(max(guest.most // 8, 16 * MIB), 512 * MIB)


def now_in(state: State, room: Room, now: float) -> State:
    """Whether memory is low, with the time since when it is, or isn't any more."""
    enough = room.reserve + room.margin if state.low else room.reserve
    low = room.available < enough
    return state if low is state.low else replace(state, low=low, since=now)


def decide(
    state: State,
    room: Room,
    guests: Sequence[Guest],
    sleepers: Sequence[Sleeper],
    *,
    policy: PressurePolicy,
    now: float,
) -> tuple[State, list[Act]]:
    """What is to be done. `state` is of `now_in`."""
    acts: list[Act] = (
        _when_low(state, room, guests, policy, now) if state.low else _when_fine(state, room, guests, sleepers, now)
    )
    if any(isinstance(act, Suspend | GoOn) for act in acts):
        state = replace(state, acted_at=now)
    return state, acts


# Memory is low


def _when_low(state: State, room: Room, guests: Sequence[Guest], policy: PressurePolicy, now: float) -> list[Act]:
    if policy == "nothing":
        return []
    spare = {guest.id: _spare(guest) for guest in guests}
    acts: list[Act] = [*_taken(room, guests, spare), *_handed(guests)]
    if policy == "suspend":
        acts += _suspended(state, room, guests, spare, now)
    leaving = {act.id for act in acts if isinstance(act, Suspend)}
    return [act for act in acts if isinstance(act, Suspend) or act.id not in leaving]


def _spare(guest: Guest) -> int:
    """What its balloon can take."""
    if guest.policy == "nothing" or guest.leaving or guest.mapped or guest.given is None or guest.available is None:
        return 0
    return max(0, min(guest.given - guest.floor, guest.available - cushion(guest)))


def _taken(room: Room, guests: Iterable[Guest], spare: dict[str, int]) -> list[Act]:
    """From each in proportion to what it can spare: nobody knows how much of that the computer gets back."""
    lacking = room.reserve + room.margin - room.available
    share = min(1.0, lacking / max(1, sum(spare.values())))
    return [
        MoveBalloon(guest.id, guest.given - taken)
        for guest in guests
        if guest.given is not None and not guest.moving and (taken := int(spare[guest.id] * share)) >= SMALLEST_MOVE
    ]


def _handed(guests: Iterable[Guest]) -> list[Act]:
    """To guests that have hardly anything left, before they end programs of theirs."""
    acts: list[Act] = []
    for guest in guests:
        if guest.given is None or guest.available is None or guest.leaving or guest.moving:
            continue
        size = min(guest.most, guest.given + cushion(guest) - guest.available)
        if guest.available < cushion(guest) // 2 and size >= guest.given + SMALLEST_MOVE:
            acts.append(MoveBalloon(guest.id, size))
    return acts


def _suspended(state: State, room: Room, guests: Sequence[Guest], spare: dict[str, int], now: float) -> list[Act]:
    """The least active ones, as many as it takes, when balloons don't help or memory goes too fast for them."""
    going_fast = room.available < room.reserve - room.margin // 2
    waited = now - max(state.since, state.acted_at) >= PATIENCE
    balloons_can = any(each >= SMALLEST_MOVE for each in spare.values())
    if room.available >= room.reserve or not (going_fast or (waited and not balloons_can)):
        return []
    lacking = room.reserve + room.margin // 2 - room.available
    lacking -= sum(guest.private for guest in guests if guest.leaving)
    acts: list[Act] = []
    for guest in sorted(guests, key=_importance):
        if lacking > 0 and guest.policy == "suspend" and guest.may_sleep and not guest.leaving:
            acts.append(Suspend(guest.id))
            lacking -= guest.private
    return acts


def _importance(guest: Guest) -> tuple[int, int, str]:
    """Of those that are about as active, the largest goes first: fewer have to."""
    return (guest.activity > IDLE) + (guest.activity > BUSY), -guest.private, guest.id


# Memory is there again


def _when_fine(state: State, room: Room, guests: Iterable[Guest], sleepers: Iterable[Sleeper], now: float) -> list[Act]:
    if now - state.since < CALM:
        return []
    left = room.available - room.reserve - room.margin
    acts: list[Act] = []
    all_back = True
    for guest in guests:
        if guest.given is None or guest.leaving:
            continue
        back = min(guest.most - guest.given, max(0, left))
        all_back = all_back and guest.given + back + SMALLEST_MOVE > guest.most
        if not guest.moving and (guest.unsure or back >= min(SMALLEST_MOVE, guest.most - guest.given) > 0):
            acts.append(MoveBalloon(guest.id, guest.given + max(0, back)))
        left -= max(0, back)
    if all_back and now - state.acted_at >= CALM:
        fitting = (each for each in sorted(sleepers, key=lambda each: (each.since, each.id)) if each.needs <= left)
        acts += [GoOn(each.id) for each in fitting][:1]
    return acts
