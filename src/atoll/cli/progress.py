"""Progress on standard error: a bar on a terminal once something takes half a second, now and then a line elsewhere."""

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Self

import click

from atoll.model.operation import Progress
from atoll.model.units import format_size

if TYPE_CHECKING:
    import rich.progress

PATIENCE = 0.5
"""Seconds before a terminal shows something; what is over by then shows nothing."""
FIRST_LINE, NEXT_LINE = 2.0, 15.0
"""Seconds before the first plain line, and between two lines about the same step."""


class Shown:
    """Shows what an operation reports: `with Shown("building tiny") as shown: await build(report=shown.report)`."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title = title
        self._quiet = quiet
        self._latest = Progress(step="")
        self._began = self._last_line = time.monotonic()
        self._told_step = ""
        self._bar: rich.progress.Progress | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        if not self._quiet:
            loop = asyncio.get_running_loop()
            if sys.stderr.isatty():
                self._timer = loop.call_later(PATIENCE, self._show_bar)
            else:
                self._timer = loop.call_later(FIRST_LINE, self._line)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.stop()

    def report(self, progress: Progress) -> None:
        """Take a report; may be called from any thread."""
        self._latest = progress
        if self._quiet:
            return
        if self._bar is not None:
            self._update_bar()
        elif not sys.stderr.isatty():
            now = time.monotonic()
            waited = NEXT_LINE if progress.step == self._told_step else FIRST_LINE
            if now - self._last_line >= waited and now - self._began >= FIRST_LINE:
                self._line()

    def step(self, name: str) -> None:
        """Report that something without an end in sight goes on."""
        self.report(Progress(step=name))

    def _line(self) -> None:
        self._told_step, self._last_line = self._latest.step, time.monotonic()
        parts = [self._title, self._latest.step, amount(self._latest)]
        with contextlib.suppress(OSError):
            click.echo(": ".join(part for part in parts if part), err=True)

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.add_task(self._title, total=None, amount="")
        self._update_bar()
        self._bar.start()

    def _update_bar(self) -> None:
        assert self._bar is not None
        latest = self._latest
        description = f"{self._title}: {latest.step}" if latest.step else self._title
        task = self._bar.task_ids[0]
        self._bar.update(task, description=description, completed=latest.done, amount=amount(latest))
        # `update` takes a total of None for "leave it".
        self._bar.tasks[0].total = latest.total


def amount(progress: Progress) -> str:
    """How far it came, in words: `12MiB of 40MiB`, `40%`, `3 of 7`."""
    done, total = progress.done, progress.total
    match progress.unit:
        case "bytes":
            return f"{format_size(done)} of {format_size(total)}" if total else format_size(done)
        case "percent":
            return f"{done:.0f}%"
        case "steps":
            return f"{done:.0f} of {total:.0f}" if total else ""
        case "seconds":
            return f"{done:.0f} s"
    return f"{done:.0f} of {total:.0f}" if total else ""
