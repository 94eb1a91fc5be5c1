"""What is done when the computer's memory is short."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import InvalidInput
from atoll.model.pressure import (
    CALM,
    PATIENCE,
    Act,
    GoOn,
    Guest,
    MoveBalloon,
    PressurePolicy,
    Room,
    Sleeper,
    State,
    Suspend,
    check_floor,
    cushion,
    decide,
    default_reserve,
    floor_of,
    margin,
    now_in,
)
from atoll.model.units import GIB, MIB

sizes = st.integers(0, 8 * GIB)
policies = st.sampled_from(get_args(PressurePolicy))


@st.composite
def some_guests(draw: st.DrawFn) -> list[Guest]:
    found = []
    for number in range(draw(st.integers(0, 6))):
        most = draw(st.integers(16 * MIB, 8 * GIB))
        given_now = draw(st.one_of(st.none(), st.integers(0, most)))
        guest = Guest(
            id=f"v{number}",
            most=most,
            floor=floor_of(most, draw(st.one_of(st.none(), sizes))),
            given=given_now,
            available=None if given_now is None else draw(st.one_of(st.none(), st.integers(0, given_now))),
            mapped=draw(st.booleans()),
            private=draw(sizes),
            activity=draw(st.floats(0, 4)),
            policy=draw(policies),
            may_sleep=draw(st.booleans()),
            leaving=draw(st.booleans()),
            moving=draw(st.booleans()),
            unsure=draw(st.booleans()),
        )
        found.append(guest)
    return found


some_sleepers = st.lists(
    st.builds(Sleeper, id=st.text("abcdef", min_size=3, max_size=8), since=st.floats(0, 100), needs=sizes),
    max_size=4,
    unique_by=lambda each: each.id,
)
rooms = st.builds(Room, available=sizes, reserve=sizes, margin=st.integers(64 * MIB, 512 * MIB))
states = st.builds(State, low=st.booleans(), since=st.floats(0, 90), acted_at=st.floats(0, 90))


def decided(
    state: State, room: Room, guests: list[Guest], sleepers: list[Sleeper], policy: PressurePolicy, now: float = 100.0
) -> tuple[State, list[Act]]:
    return decide(now_in(state, room, now), room, guests, sleepers, policy=policy, now=now)


@given(states, rooms, some_guests(), some_sleepers, policies)
def test_each_vm_is_told_one_thing_at_most_and_none_against_its_policy(
    state: State, room: Room, guests: list[Guest], sleepers: list[Sleeper], policy: PressurePolicy
) -> None:
    state, acts = decided(state, room, guests, sleepers, policy)
    assert len({act.id for act in acts}) == len(acts)
    by_id = {guest.id: guest for guest in guests}
    for act in acts:
        if isinstance(act, GoOn):
            continue
        guest = by_id[act.id]
        assert not guest.leaving
        if isinstance(act, Suspend):
            assert state.low and policy == "suspend" and guest.policy == "suspend" and guest.may_sleep
            assert room.available < room.reserve
        else:
            assert guest.given is not None
            assert not guest.moving
            assert act.size <= guest.most
            if act.size < guest.given:
                assert state.low and policy != "nothing" and guest.policy != "nothing"
                assert guest.available is not None and not guest.mapped
                assert act.size >= guest.floor
                assert guest.available - (guest.given - act.size) >= cushion(guest), "it keeps what it works with"


@given(rooms, some_guests(), some_sleepers, policies)
def test_nothing_is_taken_while_there_is_enough(
    room: Room, guests: list[Guest], sleepers: list[Sleeper], policy: PressurePolicy
) -> None:
    state = now_in(State(), room, 100.0)
    if room.available < room.reserve:
        assert state.low
        return
    _, acts = decide(state, room, guests, sleepers, policy=policy, now=100.0)
    by_id = {guest.id: guest for guest in guests}
    assert not any(isinstance(act, Suspend) for act in acts)
    given_back = 0
    for act in acts:
        if isinstance(act, MoveBalloon):
            before = by_id[act.id].given
            assert before is not None and act.size >= before
            given_back += act.size - before
    woken = [each for each in sleepers for act in acts if isinstance(act, GoOn) and act.id == each.id]
    assert len(woken) <= 1
    taken = given_back + sum(each.needs for each in woken)
    assert taken <= max(0, room.available - room.reserve - room.margin), "all of it fits above the reserve"


@given(st.lists(sizes, max_size=30), st.integers(0, 4 * GIB), st.integers(64 * MIB, 512 * MIB))
def test_between_low_and_enough_lies_more_than_the_margin(seen: list[int], reserve: int, more: int) -> None:
    state = State()
    turned_at: int | None = None
    for number, available in enumerate(seen):
        before, state = state, now_in(state, Room(available=available, reserve=reserve, margin=more), float(number))
        assert state.low or available >= reserve
        assert not state.low or available < reserve + more
        if before.low is not state.low:
            if turned_at is not None:
                assert abs(available - turned_at) > more
            turned_at = available


def a_guest(name: str, **values: object) -> Guest:
    base: dict[str, object] = {
        "id": name, "most": GIB, "floor": GIB // 2, "given": GIB, "available": 100 * MIB, "private": 800 * MIB,
    }  # fmt: skip
    return Guest(**(base | values))  # type: ignore[arg-type]


LOW = State(low=True, since=100.0 - PATIENCE)


def short_by(missing: int) -> Room:
    return Room(available=2 * GIB - missing, reserve=2 * GIB, margin=256 * MIB)


def test_balloons_come_first() -> None:
    guests = [a_guest("idle", available=900 * MIB), a_guest("working")]
    _, acts = decided(LOW, short_by(50 * MIB), guests, [], "suspend")
    assert acts == [MoveBalloon("idle", GIB - 306 * MIB)], "what is lacking up to the margin"


def test_a_guest_keeps_its_floor_and_what_it_works_with() -> None:
    guests = [a_guest("floor", available=1000 * MIB), a_guest("cushion", floor=32 * MIB, available=200 * MIB)]
    room = Room(available=0, reserve=8 * GIB, margin=256 * MIB)
    _, acts = decided(LOW, room, guests, [], "balloon")
    assert acts == [MoveBalloon("floor", GIB // 2), MoveBalloon("cushion", GIB - 72 * MIB)]


def test_when_balloons_have_no_more_the_least_active_vm_is_suspended() -> None:
    guests = [a_guest("busy", activity=1.0), a_guest("idle"), a_guest("larger", private=900 * MIB)]
    _, acts = decided(LOW, short_by(50 * MIB), guests, [], "suspend")
    assert acts == [Suspend("larger")], "of those that do nothing the one that gives most"
    _, acts = decided(LOW, short_by(50 * MIB), guests, [], "balloon")
    assert acts == []


def test_balloons_have_some_seconds_unless_memory_goes_fast() -> None:
    just_now = State(low=True, since=99.0)
    assert decided(just_now, short_by(50 * MIB), [a_guest("v")], [], "suspend")[1] == []
    can_give = a_guest("v", available=900 * MIB)
    assert decided(LOW, short_by(50 * MIB), [can_give], [], "suspend")[1] == [MoveBalloon("v", GIB - 306 * MIB)]
    assert decided(just_now, short_by(200 * MIB), [can_give], [], "suspend")[1] == [Suspend("v")]


def test_no_more_are_suspended_than_it_takes() -> None:
    guests = [a_guest(f"v{number}") for number in range(4)]
    _, acts = decided(LOW, short_by(900 * MIB), guests, [], "suspend")
    assert len(acts) == 2
    going = [a_guest("v0", leaving=True), a_guest("v1", leaving=True), a_guest("v2")]
    assert decided(LOW, short_by(900 * MIB), going, [], "suspend")[1] == [], "what is being written is about to be free"


def test_a_guest_that_has_hardly_anything_gets_some_however_short_memory_is() -> None:
    hungry = a_guest("v", given=600 * MIB, available=20 * MIB)
    _, acts = decided(LOW, short_by(50 * MIB), [hungry], [], "balloon")
    assert acts == [MoveBalloon("v", 708 * MIB)]


def test_balloons_are_given_back_and_then_one_after_the_other_goes_on() -> None:
    fine = State(low=False, since=50.0, acted_at=50.0)
    room = Room(available=4 * GIB, reserve=2 * GIB, margin=256 * MIB)
    held = a_guest("held", given=GIB // 2)
    sleepers = [
        Sleeper(id="late", since=20.0, needs=GIB),
        Sleeper(id="early", since=10.0, needs=GIB),
        Sleeper(id="huge", since=5.0, needs=4 * GIB),
    ]
    state, acts = decided(fine, room, [held], sleepers, "suspend")
    assert acts == [MoveBalloon("held", GIB), GoOn("early")]
    assert decided(state, room, [], sleepers, "suspend")[1] == [], "the next one some seconds later"
    assert decided(state, room, [], sleepers, "suspend", 100.0 + CALM)[1] == [GoOn("early")]
    short = Room(available=2 * GIB + 300 * MIB, reserve=2 * GIB, margin=256 * MIB)
    assert decided(fine, short, [held], sleepers, "suspend")[1] == [MoveBalloon("held", GIB // 2 + 44 * MIB)]


def test_what_an_agent_that_is_gone_has_left_is_taken_back() -> None:
    fine = State()
    room = Room(available=4 * GIB, reserve=2 * GIB, margin=256 * MIB)
    assert decided(fine, room, [a_guest("v", unsure=True)], [], "nothing")[1] == [MoveBalloon("v", GIB)]
    assert decided(fine, room, [a_guest("v")], [], "nothing")[1] == []


def test_the_reserve_fits_the_computer() -> None:
    assert default_reserve(2 * GIB) == 256 * MIB
    assert default_reserve(32 * GIB) == 2 * GIB
    assert default_reserve(512 * GIB) == 4 * GIB
    assert margin(24 * GIB) == 384 * MIB


def test_a_floor_is_some_of_the_memory() -> None:
    assert floor_of(GIB, None) == GIB // 2
    assert floor_of(GIB, 700 * MIB) == 700 * MIB
    check_floor(GIB, None)
    check_floor(GIB, GIB)
    check_floor(16 * MIB, 16 * MIB)
    for wrong in (31 * MIB, GIB + 1):
        with pytest.raises(InvalidInput, match="at least"):
            check_floor(GIB, wrong)
