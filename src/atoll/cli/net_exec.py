"""`net exec`: a program of this computer inside a network."""

import os
from typing import TYPE_CHECKING

import click

from atoll.cli.failures import OWN_FAILURE, settings
from atoll.cli.options import NETWORK, TakesCommand, without_dashes
from atoll.errors import ProcessFailed

if TYPE_CHECKING:
    from atoll.model.vm import ExecResult
    from atoll.platform.api import AsyncHost


class _Exec(TakesCommand):
    takes_command_at_once = True


@click.command("exec", cls=_Exec)
@click.argument("network", type=NETWORK)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def exec_inside(network: str, command: tuple[str, ...]) -> int:
    """Run a program of this computer inside a network, with its names, and end with its exit code.

    It sees this computer's files as ever, and of networks that one alone. Atoll's own failures end with 125.

    \b
    Examples:
      atoll net exec lab -- curl http://web/
      atoll net exec lab -- ping -c 1 db
      atoll net exec lab -- sh
    """
    from atoll.cli.session import perform

    settings().own_failure = OWN_FAILURE

    words = without_dashes(command)
    if settings().host is not None:
        return _over_there(network, words)

    async def action(host: "AsyncHost") -> list[str]:
        return await host.networks.command_line(network, words)

    line = perform(action, cancelled="")
    # It takes our place, so it has our terminal, streams and signals, and its exit code is ours.
    try:
        os.execv(line[0], line)
    except OSError as error:
        raise ProcessFailed(f"{line[0]} can't be started", str(error)) from error


def _over_there(network: str, command: tuple[str, ...]) -> int:
    """Another computer runs a program of its own, without our terminal; its output comes at its end."""
    from atoll.cli.output import write_bytes
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "ExecResult":
        return await host.networks.exec(network, command)

    ended = perform(action)
    write_bytes(ended.stdout)
    write_bytes(ended.stderr, to_errors=True)
    return ended.exit_code
