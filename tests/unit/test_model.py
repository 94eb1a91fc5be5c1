"""Sizes and times as people write them, names and how they are found, phases and what each allows."""

import math
import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from atoll.errors import InvalidInput, NotFound, WrongState
from atoll.model.names import check_image_name, check_vm_name, find, new_id
from atoll.model.state import ALLOWED, Phase, Verb, phase_of_run_state, require
from atoll.model.units import GIB, KIB, MIB, TIB, format_duration, format_size, parse_duration, parse_size

LARGEST = 2**63 - 1


def short(value: object) -> str:
    """A value as the name of a test."""
    return ascii(value)[:30]


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("1k", KIB),
        ("1KiB", KIB),
        ("1kB", 1000),
        ("512MiB", 512 * MIB),
        ("512 mib", 512 * MIB),
        ("  2M ", 2 * MIB),
        ("10G", 10 * GIB),
        ("10GB", 10 * 1000**3),
        ("1.5g", GIB + GIB // 2),
        ("1.001kB", 1001),
        ("0.1TiB", TIB // 10),
        ("64T", 64 * TIB),
        ("007", 7),
        ("9223372036854775807", LARGEST),
        ("0" * 5000 + "1", 1),
        ("1." + "0" * 5000, 1),
        (12, 12),
    ],
    ids=short,
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "G", "1X", "1 GiB more", "-1", "+1", "1e3", "0x10", "1,5G", ".5G", "1.G", "1GG", "1m30s", "inf", "nan",
        "٣GiB", "1ＧiB", "1G\x00", "½G", "🐧", "9223372036854775808", "9999999T", "9" * 5000, "9" * 5000 + "G", -1,
        2**63, -(10**400), 10**400,
    ],
    ids=short,
)  # fmt: skip
def test_what_is_no_size_is_refused_with_an_example(text: str | int) -> None:
    with pytest.raises(InvalidInput, match="size") as refused:
        parse_size(text)
    assert refused.value.next_step == "Write it like 512MiB or 10GiB."
    assert len(refused.value.text) < 150


def test_a_number_that_python_can_not_even_print_is_refused() -> None:
    for number in (10**5000, -(10**5000)):
        with pytest.raises(InvalidInput, match="size"):
            parse_size(number)
        with pytest.raises(InvalidInput, match="time"):
            parse_duration(number)


@given(st.integers(0, LARGEST))
def test_a_plain_number_of_bytes_is_exact(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == size


@given(st.integers(0, 2**33 - 1), st.sampled_from(["KiB", "MiB", "GiB"]))
def test_whole_units_are_read_exactly(count: int, unit: str) -> None:
    assert parse_size(f"{count}{unit}") == count * {"KiB": KIB, "MiB": MIB, "GiB": GIB}[unit]


@given(st.integers(0, 2**60))
def test_a_formatted_size_is_short_and_reads_as_nearly_the_same(size: int) -> None:
    text = format_size(size)
    number = re.fullmatch(r"(\d+(?:\.[1-9])?)(B|[KMGT]iB)", text)
    assert number
    assert float(number[1]) < 1024 or number[2] == "TiB"
    assert math.isclose(parse_size(text), size, rel_tol=0.051)
    assert format_size(parse_size(text)) == text


@given(st.integers(1, 1023), st.sampled_from([1, KIB, MIB, GIB, TIB]))
def test_a_whole_unit_survives_the_way_there_and_back(count: int, unit: int) -> None:
    assert parse_size(format_size(count * unit)) == count * unit


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (MIB - 1, "1MiB"), (GIB - 1, "1GiB"), (2.9, "2B")]
)
def test_sizes_at_the_edges_of_units(size: float, text: str) -> None:
    assert format_size(size) == text


# Times


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("30", 30),
        ("1.5", 1.5),
        ("50ms", 0.05),
        ("30s", 30),
        ("2m", 120),
        ("2M", 120),
        ("1h", 3600),
        ("1d2h", 93600),
        ("1m30s", 90),
        (" 1m30s ", 90),
        ("1s500ms", 1.5),
        ("0.5h", 1800),
        (2.5, 2.5),
        (3, 3),
    ],
)
def test_times_are_read_as_people_write_them(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "", "s", "1y", "-1s", "1m30", "1m-30s", "m1s", "1:30", "1e3s", "inf", "nan", "٣s", "9" * 400, "9" * 400 + "d",
        "1m" + "9" * 400 + "s", -1, -0.1, math.inf, -math.inf, math.nan, 1e300, 10**400,
    ],
    ids=short,
)  # fmt: skip
def test_what_is_no_time_is_refused_with_an_example(text: str | float) -> None:
    with pytest.raises(InvalidInput, match="time") as refused:
        parse_duration(text)
    assert refused.value.next_step == "Write it like 50ms, 30s or 2m."
    assert len(refused.value.text) < 150


@given(st.integers(0, 10**9), st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_whole_times_are_read_exactly(count: int, unit: str) -> None:
    milliseconds = count * {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}[unit]
    assert parse_duration(f"{count}{unit}") == milliseconds / 1000


@given(st.floats(0, 1e9))
def test_a_formatted_time_is_short_and_reads_as_nearly_the_same(seconds: float) -> None:
    text = format_duration(seconds)
    assert re.fullmatch(r"\d{1,3}ms|\d(\.[1-9])?s|(\d+[dhms]){1,2}", text)
    assert math.isclose(parse_duration(text), seconds, rel_tol=0.051, abs_tol=0.0005)
    assert format_duration(parse_duration(text)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"), (0.05, "50ms"), (0.9996, "1s"), (1.25, "1.2s"), (9.96, "10s"), (59.6, "1m"), (90, "1m30s"),
        (3600, "1h"), (3661, "1h1m"), (86399.6, "1d"), (93784, "1d2h"), (86400 + 60, "1d"),
    ],
)  # fmt: skip
def test_times_at_the_edges_of_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# Names


@pytest.mark.parametrize("name", ["a", "0", "web", "WEB", "brave-otter", "a.b_c-d", "db1.example.org", "x" * 63])
def test_names_that_a_host_could_have_are_names_of_vms(name: str) -> None:
    assert check_vm_name(name) == name


UNFIT = [
    "", " ", "a b", " a", "a ", "a\n", "a\0", "a\tb", "-a", ".a", "..", ".", "_a", "a/b", "/a", "../a", "a\\b", "~",
    "a:b", "a,b", "a=b", "a'b", 'a"b', "a;b", "a$b", "a%b", "a{n}", "größe", "数据库", "🐧", "a🐧", "e\u0301", "ｗｅｂ",
    "\ud800", "\u202eweb", "x" * 64, "x" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("name", UNFIT, ids=short)
def test_other_names_are_refused_with_what_a_name_is(name: str) -> None:
    with pytest.raises(InvalidInput, match="can't be the name of a VM") as refused:
        check_vm_name(name)
    assert "starts with a letter or digit" in refused.value.why
    assert "--name" in refused.value.next_step
    # What was given can't steer a terminal, nor fill it.
    assert refused.value.text.isprintable()
    assert len(refused.value.text) < 400


@given(st.text())
def test_a_name_that_is_allowed_is_safe_wherever_it_goes(name: str) -> None:
    try:
        check_vm_name(name)
    except InvalidInput:
        return
    assert re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}", name)


@pytest.mark.parametrize(
    ("name", "whole"),
    [("tiny", "tiny:latest"), ("debian:13", "debian:13"), ("team/web:v2", "team/web:v2"), ("a/b/c", "a/b/c:latest")],
)
def test_images_have_names_with_a_tag(name: str, whole: str) -> None:
    assert check_image_name(name) == whole
    assert check_image_name(whole) == whole


@pytest.mark.parametrize(
    "name",
    ["", "Tiny", "a:", ":a", "a:b:c", "a//b", "/a", "a/", "../a", "a/../b", "a b", "a\n", "größe", "🐧", "x" * 64],
)
def test_other_names_of_images_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="can't be the name of an image") as refused:
        check_image_name(name)
    assert "debian:13" in refused.value.next_step


class Named(Struct):
    id: str
    name: str


WEB, WEB2, API = Named("aa11", "web"), Named("aa22", "web2"), Named("bb33", "api")
THINGS = [WEB2, API, WEB]


@pytest.mark.parametrize(
    ("reference", "found"),
    [("web", WEB), ("web2", WEB2), ("aa11", WEB), ("aa1", WEB), ("a", None), ("ap", API), ("b", API), ("bb33", API)],
)
def test_a_name_an_id_or_a_unique_prefix_finds_a_vm(reference: str, found: Named | None) -> None:
    if found is not None:
        assert find(reference, THINGS, "VM") is found
        return
    with pytest.raises(InvalidInput, match="'a' fits 3 VMs: api, web, web2"):
        find(reference, THINGS, "VM")


def test_an_exact_name_comes_before_an_id_and_both_before_prefixes() -> None:
    usurper = Named("cc44", "aa11")
    assert find("aa11", [WEB, usurper], "VM") is usurper
    assert find("aa11", [usurper, WEB], "VM") is usurper
    longer = Named("dd55", "aa22-copy")
    assert find("aa22", [longer, WEB2], "VM") is WEB2


@pytest.mark.parametrize(
    ("reference", "next_step"),
    [("wbe", "Did you mean web"), ("zzz", "`atoll ls` lists"), ("", "`atoll ls` lists"), ("🐧", "`atoll ls` lists")],
)
def test_what_is_not_there_is_told_with_near_names(reference: str, next_step: str) -> None:
    with pytest.raises(NotFound, match=f"there is no VM '{reference}'") as missing:
        find(reference, THINGS, "VM")
    assert next_step in missing.value.next_step


@given(st.lists(st.sampled_from("abc"), min_size=1).map("".join), st.sets(st.text("abc", min_size=1), max_size=6))
def test_a_prefix_finds_the_one_thing_that_has_it_or_nothing(reference: str, names: set[str]) -> None:
    things = [Named(f"id-{name}", name) for name in sorted(names)]
    fitting = [thing for thing in things if thing.name.startswith(reference)]
    try:
        found = find(reference, things, "VM")
    except NotFound:
        assert fitting == []
    except InvalidInput:
        assert len(fitting) > 1
        assert reference not in names
    else:
        assert found.name == reference or fitting == [found]


def test_ids_are_long_and_not_the_same_twice() -> None:
    assert len({new_id() for _ in range(100)}) == 100
    assert re.fullmatch(r"[0-9a-f]{32}", new_id())


# Phases (that each state of a real QEMU has one is in tests/vm/test_monitor.py)

VERBS: tuple[Verb, ...] = get_args(Verb)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_allowed_or_refused_with_the_phase_and_a_way_out(verb: Verb, phase: Phase) -> None:
    if phase in ALLOWED[verb]:
        require("web", phase, verb)
        return
    with pytest.raises(WrongState, match=f"web: can't {verb}: it is {phase}") as refused:
        require("web", phase, verb)
    # There is nothing to do for someone who wants what is so already.
    assert refused.value.next_step or (verb, phase) == ("resume", Phase.RUNNING)


def test_every_phase_can_be_left() -> None:
    assert set(ALLOWED) == set(VERBS)
    for phase in Phase:
        assert any(phase in ALLOWED[verb] for verb in ("start", "stop"))


def test_only_what_is_known_to_be_stopped_is_removed_or_started() -> None:
    assert ALLOWED["rm"] == ALLOWED["start"] == {Phase.STOPPED, Phase.SUSPENDED}
    assert phase_of_run_state("a state that a later QEMU may have") is Phase.UNKNOWN
