"""Which VMs are started again, and after how long."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import InvalidInput
from atoll.model.supervision import (
    GOOD_RUN,
    LONGEST_DELAY,
    Attempts,
    EndReason,
    RestartPolicy,
    check,
    is_restarted,
    next_attempt,
    returns_after_boot,
)

reasons = st.sampled_from(get_args(EndReason))
policies = st.sampled_from(get_args(RestartPolicy))
attempts = st.builds(Attempts, count=st.integers(0, 10_000), started_at=st.floats(0, 1e9))


@given(policies, reasons, st.booleans())
def test_what_somebody_stopped_stays_stopped(policy: RestartPolicy, reason: EndReason, new_boot: bool) -> None:
    assert not is_restarted(policy, reason, asked=True, new_boot=new_boot)
    assert not is_restarted(policy, "stopped", asked=False, new_boot=new_boot)
    assert not is_restarted("never", reason, asked=False, new_boot=new_boot)


@given(reasons, st.booleans())
def test_always_restarts_whatever_on_failure_does(reason: EndReason, new_boot: bool) -> None:
    on_failure = is_restarted("on-failure", reason, asked=False, new_boot=new_boot)
    always = is_restarted("always", reason, asked=False, new_boot=new_boot)
    assert always or not on_failure
    assert (always and not on_failure) == (reason in ("guest-shutdown", "guest-reset"))


def test_on_failure_means_these_ends() -> None:
    failures = {each for each in get_args(EndReason) if is_restarted("on-failure", each, asked=False)}
    assert failures == {"crashed", "killed", "guest-panic", "unknown", "host-rebooted", "start-failed"}


@given(policies, reasons, st.booleans(), st.booleans())
def test_a_boot_starts_what_is_marked_and_what_went_down_with_the_computer(
    policy: RestartPolicy, reason: EndReason, asked: bool, autostart: bool
) -> None:
    returns = returns_after_boot(policy, reason, asked=asked, autostart=autostart)
    went_down = reason in ("host-rebooted", "host-shutdown") and policy != "never" and not asked
    assert returns == (autostart or went_down)
    assert returns_after_boot(policy, None, asked=False, autostart=autostart) == autostart


def test_what_the_computers_shutdown_stopped_waits_for_its_boot() -> None:
    assert not is_restarted("always", "host-shutdown", asked=False)
    assert is_restarted("always", "host-shutdown", asked=False, new_boot=True)


def test_pauses_double_up_to_a_minute() -> None:
    now, found = Attempts(), []
    for _ in range(9):
        now, delay = next_attempt(now, ended_at=now.started_at)
        found.append(delay)
    assert found == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@given(attempts, st.floats(0, 1e9))
def test_a_pause_is_bounded_and_a_good_run_ends_the_row(before: Attempts, ran: float) -> None:
    after, delay = next_attempt(before, ended_at=before.started_at + ran)
    assert 1 <= delay <= LONGEST_DELAY
    if ran > GOOD_RUN + 1:
        assert (after.count, delay) == (1, 1)
    if ran < GOOD_RUN - 1:
        assert after.count == before.count + 1


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(InvalidInput, match="--rm and --restart"):
        check(restart="always", boot_order=0, throwaway=True)
    with pytest.raises(InvalidInput, match="boot order"):
        check(restart="never", boot_order=-1, throwaway=False)
