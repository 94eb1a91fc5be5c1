"""Measuring: sides take turns, so that a machine that is busy for a while is busy for each of them."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Measure = Callable[[], float]
"""Does the thing once, puts everything back as it was, and returns the seconds that the thing itself took."""


@dataclass(frozen=True)
class Goal:
    """Ours shall be at most `factor` times `side` and `plus` more, or at most `limit`, in the case's own unit."""

    side: str = ""
    factor: float = 1.0
    limit: float = 0.0
    plus: float = 0.0

    def text(self, unit: str) -> str:
        if self.plus:
            return f"≤ {self.side} + {self.plus:g} {unit}"
        return f"≤ {self.factor:g} × {self.side}" if self.side else f"≤ {self.limit:g} {unit}"


@dataclass(frozen=True)
class Case:
    """One row of the table: what is measured, how often, and what is aimed at."""

    name: str
    repetitions: int
    measures: Mapping[str, Measure]
    goals: Sequence[Goal] = ()
    unit: str = "ms"


@dataclass
class Figures:
    """What each side took, in the case's unit, in the order of the repetitions."""

    case: str
    unit: str
    goals: Sequence[Goal]
    values: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def median(self, side: str) -> float | None:
        return statistics.median(self.values[side]) if self.values.get(side) else None

    def met(self, goal: Goal) -> bool | None:
        """None when a side that it takes wasn't measured."""
        ours, other = self.median("atoll"), self.median(goal.side) if goal.side else None
        if ours is None or (goal.side and other is None):
            return None
        return ours <= (goal.factor * other + goal.plus if other is not None else goal.limit)


def measure(case: Case, tell: Callable[[str], None]) -> Figures:
    """All repetitions of a case. A side that fails is dropped with its error; the others go on."""
    figures = Figures(case=case.name, unit=case.unit, goals=case.goals)
    factor = 1000.0 if case.unit == "ms" else 1.0
    sides = list(case.measures.items())
    for repetition in range(case.repetitions):
        # Another one begins each time: who comes later finds in memory what the first one had to read.
        turn = repetition % len(sides)
        for side, run in sides[turn:] + sides[:turn]:
            if side in figures.errors:
                continue
            # What one side has left to be written shall not be what another one waits for.
            os.sync()
            try:
                figures.values.setdefault(side, []).append(run() * factor)
            except (subprocess.SubprocessError, OSError, RuntimeError, ValueError, KeyError) as error:
                said = getattr(error, "stderr", None)
                figures.errors[side] = (said.decode(errors="replace") if said else str(error)).strip()[-300:]
                tell(f"  {side} failed: {figures.errors[side]}")
        if repetition == 0:
            tell(f"{case.name}: {', '.join(f'{s} {v[0]:.0f}' for s, v in figures.values.items() if v)} {case.unit}")
    return figures


def timed(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> float:
    """Seconds that a whole program takes, from its start to its end. Raises `CalledProcessError`."""
    began = time.perf_counter()
    subprocess.run(argv, env=env, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
    return time.perf_counter() - began
