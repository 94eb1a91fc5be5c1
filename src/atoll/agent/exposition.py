"""Prometheus' text format (version 0.0.4): families of samples, and histograms."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Literal

TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)
"""Seconds."""
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = Mapping[str, str]


class Family:
    """One metric, with its samples."""

    def __init__(self, name: str, kind: Literal["counter", "gauge"], text: str) -> None:
        self.name = name
        self._lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]

    def add(self, value: float, **labels: str) -> None:
        self._lines.append(f"{self.name}{_labels(labels)} {value!r}")

    def lines(self) -> list[str]:
        return self._lines


class Histogram:
    """How long things took, by labels."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._text = text
        self._counts: dict[tuple[tuple[str, str], ...], list[int]] = {}
        self._sums: dict[tuple[tuple[str, str], ...], float] = {}

    def observe(self, seconds: float, **labels: str) -> None:
        key = tuple(labels.items())
        counts = self._counts.setdefault(key, [0] * (len(BUCKETS) + 1))
        counts[bisect_left(BUCKETS, seconds)] += 1
        self._sums[key] = self._sums.get(key, 0.0) + seconds

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self._text}"
        yield f"# TYPE {self.name} histogram"
        for key, counts in self._counts.items():
            labels, total = dict(key), 0
            for bound, count in zip((*BUCKETS, float("inf")), counts, strict=True):
                total += count
                shown = "+Inf" if bound == float("inf") else f"{bound:g}"
                yield f"{self.name}_bucket{_labels({**labels, 'le': shown})} {total}"
            yield f"{self.name}_sum{_labels(labels)} {self._sums[key]!r}"
            yield f"{self.name}_count{_labels(labels)} {total}"


def _labels(labels: Labels) -> str:
    told = ",".join(f'{name}="{value.translate(_ESCAPED)}"' for name, value in labels.items())
    return f"{{{told}}}" if told else ""
