"""`shutdown`, and `stop --all`: every VM within a time limit."""

from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format, tell
from atoll.cli.options import DURATION
from atoll.cli.output import emit, format_option, print_table
from atoll.errors import AtollError

if TYPE_CHECKING:
    from atoll.model.vm import Stopped
    from atoll.platform.api import AsyncHost


@click.command("shutdown")
@click.option("--timeout", "-t", type=DURATION, default="90s", help="How long all of it may take (default: 90s).")
@click.option("--suspend", is_flag=True, help="Keep their memory on the disk where there is time for it.")
@format_option
def shutdown_command(timeout: float, suspend: bool, format: Format) -> int:
    """Stop all VMs as this computer goes down: the highest boot order first. `atoll serve --install` sees to it.

    Those with --restart on-failure or always return when the agent runs after the computer's next start, and so do
    those with --autostart. `atoll stop --all` stops them for good.

    \b
    Example:
      atoll shutdown --timeout 90s
    """
    return stop_all(timeout=timeout, suspend=suspend, for_shutdown=True, format=format)


def stop_all(*, timeout: float, suspend: bool, for_shutdown: bool, format: Format) -> int:
    """Stop all VMs, and tell what became of each; the exit code."""
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "list[Stopped]":
        with Shown("stopping all VMs") as shown:
            return await host.stop_all(timeout=timeout, suspend=suspend, for_shutdown=for_shutdown, report=shown.report)

    done = perform(action)
    if format != "table":
        emit(done, format)
    elif done:
        print_table(("NAME", "OUTCOME"), [(each.name, each.outcome) for each in done])
    failed = [each for each in done if each.outcome == "failed"]
    for each in failed if format == "table" else ():
        tell(AtollError(f"{each.name}: it could not be stopped", each.error), format)
    return 1 if failed else 0
