"""What the agent does for VMs: options of `run`, `create` and `set`."""

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from atoll.model.pressure import PressurePolicy
from atoll.model.supervision import RestartPolicy

F = TypeVar("F", bound=Callable[..., Any])


def supervision(default: RestartPolicy | None) -> tuple[Callable[[F], F], ...]:
    """What the agent does for a VM. `default` is that of `--restart`; None leaves all of it alone."""
    fresh = default is not None
    return (
        click.option(
            "--restart", type=click.Choice(get_args(RestartPolicy)), default=default,
            help="When `atoll serve` starts it again after it has ended by itself.",
        ),
        click.option(
            "--autostart/--no-autostart", default=False if fresh else None,
            help="Whether `atoll serve` starts it when this computer has started.",
        ),
        click.option(
            "--boot-order", type=int, metavar="N", default=0 if fresh else None,
            help="Lower numbers are started first, and stopped last (0 to 1000).",
        ),
        click.option(
            "--memory-min", metavar="SIZE",
            help="What it is left when this computer's memory is short (default: half of its memory).",
        ),
        click.option(
            "--on-memory-pressure", type=click.Choice(get_args(PressurePolicy)),
            default="suspend" if fresh else None,
            help="What `atoll serve` may do to it then: suspend it, move its balloon only, or nothing.",
        ),
    )  # fmt: skip
