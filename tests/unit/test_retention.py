"""Which backups a policy keeps."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import InvalidInput
from atoll.model.backup import Keep
from atoll.model.retention import check, kept

START = datetime(2026, 1, 1, tzinfo=UTC)
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def at(*moments: str) -> dict[str, float]:
    return {moment: datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp() for moment in moments}


def names(times: dict[str, float], keep: Keep) -> set[str]:
    return set(kept(times, keep, zone=UTC))


def test_the_newest_of_each_day_is_kept_and_days_without_one_do_not_count() -> None:
    times = at("2026-01-01T01", "2026-01-01T23", "2026-01-02T12", "2026-01-09T01", "2026-01-09T02")
    assert names(times, Keep(daily=2)) == {"2026-01-02T12", "2026-01-09T02"}
    assert names(times, Keep(daily=9)) == {"2026-01-01T23", "2026-01-02T12", "2026-01-09T02"}
    assert names(times, Keep(last=1)) == {"2026-01-09T02"}
    assert names(times, Keep(hourly=2, yearly=3)) == {"2026-01-09T01", "2026-01-09T02"}


def test_weeks_begin_on_monday_also_across_the_year() -> None:
    # 2026-12-28 is a Monday, 2027-01-03 the Sunday of that week.
    times = at("2026-12-27T12", "2026-12-28T12", "2027-01-03T12", "2027-01-04T12")
    assert names(times, Keep(weekly=9)) == {"2026-12-27T12", "2027-01-03T12", "2027-01-04T12"}
    assert names(times, Keep(monthly=2)) == {"2026-12-28T12", "2027-01-04T12"}
    assert names(times, Keep(yearly=2)) == {"2026-12-28T12", "2027-01-04T12"}


def test_each_rule_says_why() -> None:
    times = at("2026-01-01T01", "2026-02-01T01")
    assert kept(times, Keep(last=1, monthly=2), zone=UTC) == {
        "2026-02-01T01": ("last", "monthly"),
        "2026-01-01T01": ("monthly",),
    }


def test_the_hour_that_comes_twice_is_two_hours() -> None:
    times = at("2026-10-25T00:30", "2026-10-25T01:30")
    assert len(kept(times, Keep(hourly=5), zone=ZoneInfo("Europe/Berlin"))) == 2


def test_a_policy_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="remove every backup"):
        check(Keep())
    with pytest.raises(InvalidInput, match="--keep-daily -1"):
        check(Keep(daily=-1, last=3))


moments = st.lists(st.integers(0, 4 * 365 * 24), max_size=60).map(
    lambda hours: {f"b{n}": (START + timedelta(hours=hour)).timestamp() for n, hour in enumerate(hours)}
)
policies = st.builds(Keep, **{rule: st.integers(0, 6) for rule in RULES})


@given(moments, policies)
def test_what_is_kept_is_bounded_and_has_the_newest(times: dict[str, float], keep: Keep) -> None:
    found = kept(times, keep, zone=UTC)
    for rule in RULES:
        assert sum(rule in why for why in found.values()) <= getattr(keep, rule)
    assert set(found) <= set(times)
    if times and any(getattr(keep, rule) for rule in RULES):
        assert times[next(iter(found))] == max(times.values())


@given(moments, policies, st.sampled_from(RULES))
def test_a_larger_policy_keeps_all_that_a_smaller_one_does(times: dict[str, float], keep: Keep, rule: str) -> None:
    larger = Keep(**{each: getattr(keep, each) + (each == rule) for each in RULES})
    assert names(times, keep) <= names(times, larger)


@given(moments, policies)
def test_pruning_twice_removes_nothing_more(times: dict[str, float], keep: Keep) -> None:
    left = {name: times[name] for name in names(times, keep)}
    assert names(left, keep) == set(left)


@given(moments)
def test_the_newest_of_each_period_is_kept(times: dict[str, float]) -> None:
    found = names(times, Keep(daily=10_000))
    days: dict[object, float] = {}
    for moment in times.values():
        day = datetime.fromtimestamp(moment, UTC).date()
        days[day] = max(moment, days.get(day, moment))
    assert sorted(times[name] for name in found) == sorted(days.values())
