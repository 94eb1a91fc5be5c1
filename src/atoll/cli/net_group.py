"""`net group create`, `ls`, `show`, `set`, `rm`: rules for what may reach a VM on a shared network."""

from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format
from atoll.cli.options import GROUP
from atoll.cli.output import age, emit, format_option, print_description, print_table
from atoll.model.groups import GroupInfo

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost

_RULES = click.option(
    "--rule", "rules", multiple=True, metavar="RULE", help="A rule; the first that fits holds. Repeatable."
)


@click.group("group")
def group_command() -> None:
    """Security groups: rules for cards on networks that VMs share.

    A rule is `allow` or `deny`, `in` or `out`, a protocol (any, tcp, udp, icmp), for tcp and udp ports, and `from` or
    `to` a peer: any, a subnet, label:KEY, label:KEY=VALUE or group:NAME. A card that has a group lets in what a rule
    allows, what answers it and what comes through its published ports; it lets out what no rule denies.

    \b
    Example:
      atoll net group create web --rule "allow in tcp 80,443 from any" --rule "allow in icmp from 10.213.0.0/24"
      atoll net group create db --rule "allow in tcp 5432 from label:role=web" --rule "deny out any to any"
      atoll run tiny --name www --network lab,group=web --label role=web
      atoll net set www --group web --group db
    """


@group_command.command("create")
@click.argument("name")
@_RULES
@format_option
def create(name: str, rules: tuple[str, ...], format: Format) -> None:
    """Make a security group. Without rules it lets nothing in.

    \b
    Example:
      atoll net group create web --rule "allow in tcp 80,8000-8100 from any"
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> GroupInfo:
        return await host.networks.groups.create(name, rules)

    made = perform(action)
    if format == "table":
        click.echo(made.name)
    else:
        emit(made, format)


@group_command.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Only names, one a line.")
@format_option
def ls(quiet: bool, format: Format) -> None:
    """List security groups.

    \b
    Example:
      atoll net group ls
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[GroupInfo]:
        return await host.networks.groups.ls()

    found = perform(action, cancelled="")
    if quiet:
        for each in found:
            click.echo(each.name)
    elif format != "table":
        emit(found, format)
    else:
        rows = [(each.name, str(len(each.rules)), ", ".join(each.vms) or "-", age(each.created_at)) for each in found]
        print_table(("NAME", "RULES", "VMS", "CREATED"), rows)


@group_command.command("show")
@click.argument("name", type=GROUP)
@format_option
def show(name: str, format: Format) -> None:
    """Tell a group's rules, and which VMs have it.

    \b
    Example:
      atoll net group show web
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> GroupInfo:
        return await host.networks.groups.show(name)

    _tell(perform(action, cancelled=""), format)


def _tell(found: GroupInfo, format: Format) -> None:
    if format != "table":
        emit(found, format)
        return
    pairs = [("Name", found.name), ("Rules", "\n".join(found.rules) or "none: nothing is let in")]
    print_description([*pairs, ("VMs", ", ".join(found.vms) or "none")])


@group_command.command("set")
@click.argument("name", type=GROUP)
@_RULES
@format_option
def set_rules(name: str, rules: tuple[str, ...], format: Format) -> None:
    """Give a group other rules in place of those that it has. They hold at once; connections that are open stay.

    \b
    Example:
      atoll net group set web --rule "allow in tcp 443 from any"
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> GroupInfo:
        return await host.networks.groups.set(name, rules)

    _tell(perform(action), format)


@group_command.command("rm")
@click.argument("names", nargs=-1, required=True, type=GROUP, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove groups that no card has.

    \b
    Example:
      atoll net group rm web
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        for each in names:
            await host.networks.groups.rm(each)

    perform(action)
