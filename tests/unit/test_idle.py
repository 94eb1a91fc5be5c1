"""When a VM counts as idle."""

import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atoll.errors import InvalidInput
from atoll.host import frame_filter
from atoll.model.idle import FRAMES_A_MINUTE, SHARE, Reading, is_idle, parse, pause, shown, with_reading

afters = st.floats(1, 1e5)
steps = st.lists(st.tuples(st.floats(0.1, 1000), st.floats(0, 1), st.integers(0, 1000)), max_size=30)


def window_of(told: list[tuple[float, float, int]], after: float) -> tuple[Reading, ...]:
    """Readings with these seconds between them, the share of a processor that was taken, and the frames."""
    at = cpu = 0.0
    index = 65_000
    window = with_reading((), Reading(at=at, cpu_seconds=cpu, frames=(index,)), after=after)
    for seconds, share, frames in told:
        at, cpu, index = at + seconds, cpu + seconds * share, (index + frames) % 65536
        window = with_reading(window, Reading(at=at, cpu_seconds=cpu, frames=(index,)), after=after)
    return window


@given(steps, afters)
def test_nobody_is_idle_sooner_than_after_the_time(told: list[tuple[float, float, int]], after: float) -> None:
    assume(sum(seconds for seconds, _, _ in told) < after)
    assert not is_idle(window_of(told, after), after=after)


@given(steps, afters)
def test_who_only_waits_is_idle_after_the_time(told: list[tuple[float, float, int]], after: float) -> None:
    quiet = [(seconds, 0.0, 0) for seconds, _, _ in told]
    assume(sum(seconds for seconds, _, _ in told) > after * 1.001)
    assert is_idle(window_of(quiet, after), after=after)


@given(steps, afters)
def test_who_works_is_never_idle(told: list[tuple[float, float, int]], after: float) -> None:
    working = [(seconds, max(share, 2 * SHARE), 0) for seconds, share, _ in told]
    assert not is_idle(window_of(working, after), after=after)


@given(steps, afters)
def test_whose_cards_are_busy_is_never_idle(told: list[tuple[float, float, int]], after: float) -> None:
    busy = [(seconds, 0.0, 2 * FRAMES_A_MINUTE * (1 + round(seconds / 60))) for seconds, _, _ in told]
    assert not is_idle(window_of(busy, after), after=after)


@given(steps, afters)
def test_the_window_stays_small_and_reaches_back(told: list[tuple[float, float, int]], after: float) -> None:
    window = window_of(told, after)
    assert len(window) <= 1 + len(told)
    if len(window) > 2:
        assert window[-1].at - window[1].at < after
    if window[-1].at >= after:
        assert window[-1].at - window[0].at >= after * 0.999


def test_another_run_or_card_begins_anew() -> None:
    old = Reading(at=0, cpu_seconds=50, frames=(1, 2))
    another_run = Reading(at=100, cpu_seconds=1, frames=(1, 2))
    another_card = Reading(at=100, cpu_seconds=51, frames=(1, 2, 3, 4))
    for now in (another_run, another_card):
        assert with_reading((old,), now, after=10) == (now,)


@given(afters)
def test_looks_are_rare_but_come_several_times_in_the_time(after: float) -> None:
    assert pause(after) <= after / 6 * 1.001 or pause(after) == 10
    assert pause(after) >= 10 or after < 60
    assert pause(after) <= 300


def test_times_are_read_and_shown() -> None:
    assert (parse("30m"), parse("never"), parse(0), parse(90)) == (1800.0, None, None, 90.0)
    assert (shown(None), shown(1800.0)) == ("never", "30m")
    for wrong in ("soon", "1ms", "1000d"):
        with pytest.raises(InvalidInput):
            parse(wrong)


def passes(frame: bytes, listing: list[frame_filter.Step]) -> bool:
    """What the kernel decides about a frame: the few operations that this filter has."""
    code = frame_filter.assembled(listing)
    program = [struct.unpack_from("HBBI", code, at) for at in range(0, len(code), 8)]
    loaded, index = 0, 0
    sizes = {0x20: 4, 0x28: 2}
    while True:
        operation, then, otherwise, number = program[index]
        if operation in sizes:
            if number + sizes[operation] > len(frame):
                return False
            loaded = int.from_bytes(frame[number : number + sizes[operation]], "big")
        elif operation == 0x15:
            index += then if loaded == number else otherwise
        else:
            return number != 0
        index += 1


@given(st.binary(min_size=0, max_size=80))
def test_only_what_is_for_a_sleeping_card_rings(rest: bytes) -> None:
    mac, address = "52:54:00:01:02:03", "10.0.2.15"
    listing = frame_filter.calls(mac, address)
    own, other, everybody = bytes.fromhex("525400010203"), bytes.fromhex("525400010204"), b"\xff" * 6
    assert passes(own + other + b"\x08\x00" + rest, listing)
    assert not passes(other + own + b"\x08\x00" + rest, listing)
    assert not passes(everybody + other + b"\x08\x00" + rest, listing), "broadcasts are for nobody in particular"
    assert not passes(b"\x33\x33" + own[2:] + other + b"\x86\xdd" + rest, listing), "router advertisements"
    asked = everybody + other + b"\x08\x06" + bytes(24)
    assert passes(asked + bytes([10, 0, 2, 15]) + rest, listing)
    assert not passes(asked + bytes([10, 0, 2, 16]) + rest, listing)
    probed = own + other + b"\x08\x06" + bytes(24) + bytes([10, 0, 2, 15])
    assert not passes(probed + rest, listing), "who knows where it is, and asks whether it still is there"


@given(st.sampled_from([bytes.fromhex("525400010203"), b"\xff" * 6, bytes(6)]), st.binary(min_size=36, max_size=60))
def test_both_forms_of_the_filter_say_the_same(to: bytes, rest: bytes) -> None:
    mac, address = "52:54:00:01:02:03", "10.0.2.15"
    for kind in (b"\x08\x06", b"\x08\x00"):
        for about in (bytes([10, 0, 2, 15]), bytes(4)):
            frame = to + bytes(6) + kind + rest[:24] + about + rest[24:]
            assert passes(frame, frame_filter.calls(mac, address)) == frame_filter.is_call(frame, mac, address)
