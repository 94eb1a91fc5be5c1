"""`share add`, `share ls`, `share rm`: folders of this computer in a VM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from atoll.cli.change import tell_changes
from atoll.cli.failures import Format
from atoll.cli.options import VM, parse_share
from atoll.cli.output import emit, format_option, print_table
from atoll.model.vm import Change, ShareInfo

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.group("share")
def share_command() -> None:
    """Share folders of this computer with a VM, list them, take them back; while it runs, too.

    \b
    Example:
      atoll share add web ./site:/srv/site
    """


def _print(shares: Sequence[ShareInfo], format: Format) -> None:
    if format != "table":
        emit(shares, format)
        return
    rows = [(s.host_path, s.guest_path, "read-only" if s.read_only else "read-write", s.state) for s in shares]
    print_table(("HERE", "GUEST", "ACCESS", "STATE"), rows)


@share_command.command("add")
@click.argument("vm", type=VM)
@click.argument("shares", nargs=-1, required=True, metavar="HERE:GUEST[:ro]...")
@format_option
def add(vm: str, shares: tuple[str, ...], format: Format) -> None:
    """Share folders with a VM. One that is shared already, and whose server has ended, is mounted anew.

    The guest writes as you; of root's VMs as the folder's owner. `\\:` stands for a colon in a name.

    \b
    Examples:
      atoll share add web ./site:/srv/site
      atoll share add web ~/music:/mnt/music:ro
    """
    from atoll.cli.session import perform

    wanted = [parse_share(text) for text in shares]

    async def action(host: "AsyncHost") -> list[ShareInfo]:
        found = await host.get(vm)
        return [await found.share_add(each) for each in wanted]

    _print(perform(action), format)


@share_command.command("ls")
@click.argument("vm", type=VM)
@format_option
def ls(vm: str, format: Format) -> None:
    """List the folders that a VM shares.

    \b
    Example:
      atoll share ls web
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[ShareInfo]:
        return await (await host.get(vm)).shares()

    _print(perform(action, cancelled=""), format)


@share_command.command("rm")
@click.argument("vm", type=VM)
@click.argument("path", metavar="GUEST")
@format_option
def rm(vm: str, path: str, format: Format) -> None:
    """Take a folder back; it is named by its path in the guest. What is in it stays here.

    \b
    Example:
      atoll share rm web /srv/site
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Change:
        return await (await host.get(vm)).share_rm(path)

    tell_changes([perform(action)], format)
