"""Which backups a policy keeps. Pure."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, tzinfo

from atoll.errors import InvalidInput
from atoll.model.backup import Keep

Period = tuple[int, ...]

_PERIODS: dict[str, Callable[[datetime], Period]] = {
    # Of the two hours that have one name when the clocks go back, each is one.
    "hourly": lambda at: (*at.timetuple()[:4], round((at.utcoffset() or timedelta()).total_seconds())),
    "daily": lambda at: at.timetuple()[:3],
    "weekly": lambda at: at.isocalendar()[:2],
    "monthly": lambda at: at.timetuple()[:2],
    "yearly": lambda at: at.timetuple()[:1],
}


def check(keep: Keep) -> Keep:
    """The policy itself. Raises `InvalidInput` for one that keeps nothing, or less than that."""
    counts = {name: getattr(keep, name) for name in ("last", *_PERIODS)}
    for name, count in counts.items():
        if count < 0:
            raise InvalidInput(f"--keep-{name} {count} can't be", next_step="Give how many to keep.")
    if not any(counts.values()):
        raise InvalidInput(
            "that would remove every backup", "no --keep-… says which ones stay", "Say it, such as --keep-daily 7."
        )
    return keep


def kept(times: Mapping[str, float], keep: Keep, *, zone: tzinfo | None = None) -> dict[str, tuple[str, ...]]:
    """The backups that stay, newest first, each with the rules that want it.

    A rule keeps the newest backup of each of the last periods that have one, so a computer that was off for a month
    doesn't lose its days before. Periods are those of `zone`, the computer's own when None.
    """
    newest_first = sorted(times, key=lambda each: (times[each], each), reverse=True)
    reasons: dict[str, list[str]] = {each: [] for each in newest_first}
    for each in newest_first[: keep.last]:
        reasons[each].append("last")
    for rule, period_of in _PERIODS.items():
        seen: set[Period] = set()
        for each in newest_first:
            period = period_of(datetime.fromtimestamp(times[each], zone).astimezone(zone))
            if period not in seen and len(seen) < getattr(keep, rule):
                seen.add(period)
                reasons[each].append(rule)
    return {each: tuple(why) for each, why in reasons.items() if why}
