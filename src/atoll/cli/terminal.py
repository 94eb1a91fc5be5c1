"""`shell` and `console`."""

from typing import TYPE_CHECKING

import click

from atoll.cli.options import VM, TakesCommand, without_dashes

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost

_DETACH = click.option(
    "--detach-keys",
    default="ctrl-]",
    envvar="ATOLL_DETACH_KEYS",
    metavar="KEYS",
    help="What to type to detach (default: ctrl-]), such as ctrl-p,ctrl-q.",
)


class _Shell(TakesCommand):
    takes_command_at_once = True


@click.command("shell", cls=_Shell)
@click.argument("vm", type=VM)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--user", "-u", help="The user to be (default: root).")
@_DETACH
def shell_command(vm: str, command: tuple[str, ...], user: str | None, detach_keys: str) -> int:
    """Open a terminal in a VM, with a login shell or COMMAND in it. It needs the guest agent; see `console` too.

    \b
    Examples:
      atoll shell web
      atoll shell --user me web
      atoll shell web -- htop
    """
    from atoll.cli.attach import attach, parse_keys
    from atoll.cli.session import perform

    parse_keys(detach_keys)

    async def action(host: "AsyncHost") -> int:
        found = await host.get(vm)
        terminal = await found.shell(without_dashes(command), user=user)
        return await attach(terminal, keys=detach_keys, name=found.name)

    return perform(action, cancelled="")


@click.command("console")
@click.argument("vm", type=VM)
@_DETACH
def console_command(vm: str, detach_keys: str) -> int:
    """Join a VM's serial line: what a screen and a keyboard at its back would be. Detaching leaves it as it is.

    \b
    Example:
      atoll console web
    """
    from atoll.cli.attach import attach, parse_keys
    from atoll.cli.session import perform

    parse_keys(detach_keys)

    async def action(host: "AsyncHost") -> int:
        found = await host.get(vm)
        return await attach(await found.console(), keys=detach_keys, name=found.name)

    return perform(action, cancelled="")
