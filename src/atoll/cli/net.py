"""`net` and its commands: networks that VMs share, and what is on their cables."""

from typing import TYPE_CHECKING, Any, get_args

import click

from atoll.cli.change import tell_changes
from atoll.cli.failures import Format
from atoll.cli.net_capture import capture
from atoll.cli.net_exec import exec_inside
from atoll.cli.net_group import group_command
from atoll.cli.net_impair import impair, told
from atoll.cli.options import GROUP, NETWORK, VM
from atoll.cli.output import age, emit, format_option, print_description, print_table
from atoll.errors import InvalidInput
from atoll.model.network import Attached, Mode, Network, NetworkInfo
from atoll.model.requests import NetworkRequest, NicRequest, NicSetRequest
from atoll.model.spec import NicSpec
from atoll.model.units import format_rate
from atoll.model.vm import Change

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.group("net")
def net_command() -> None:
    """Networks that VMs share: each reaches the others by their names.

    \b
    Example:
      atoll net create lab
      atoll run tiny --name web --network lab
      atoll run tiny --name db --network lab -- ping -c 1 web
    """


net_command.add_command(group_command)


@net_command.command("create")
@click.argument("name")
@click.option(
    "--mode", type=click.Choice(get_args(Mode)), default="private",
    help="private: leads nowhere (the default); nat: out through this computer, and published ports in; "
    "bridge: the network behind a bridge that this computer has.",
)  # fmt: skip
@click.option("--bridge", metavar="BRIDGE", help="That bridge, such as br0.")
@click.option("--subnet", metavar="CIDR", help="Its addresses, such as 10.20.30.0/24 (default: a free one).")
@click.option("--ipv6", is_flag=True, help="Give its VMs IPv6 addresses as well; in mode nat also a way out by it.")
@click.option("--dns-domain", metavar="DOMAIN", help="VMs are VM.DOMAIN on it (default: NAME.atoll).")
@format_option
def create(name: str, format: Format, **options: Any) -> None:
    """Make a network. It comes up when the first VM on it starts.

    \b
    Examples:
      atoll net create lab
      atoll net create lab6 --ipv6
      atoll net create web --mode nat --subnet 10.20.30.0/24 --dns-domain web.example
      sudo atoll net create office --mode bridge --bridge br0
    """
    from atoll.cli.session import perform

    request = NetworkRequest(name=name, **options)

    async def action(host: "AsyncHost") -> Network:
        return await host.networks.create(request)

    made = perform(action)
    if format == "table":
        click.echo(made.name)
    else:
        emit(made, format)


@net_command.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Only names, one a line.")
@format_option
def ls(quiet: bool, format: Format) -> None:
    """List networks, the oldest first.

    \b
    Example:
      atoll net ls
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[NetworkInfo]:
        return await host.networks.ls()

    found = perform(action, cancelled="")
    if quiet:
        for each in found:
            click.echo(each.network.name)
    elif format != "table":
        emit(found, format)
    else:
        rows = [
            (
                each.network.name,
                each.network.mode,
                each.network.subnet or each.network.bridge,
                "up" if each.up else "down",
                ", ".join(card.vm for card in each.attached) or "-",
                age(each.network.created_at),
            )
            for each in found
        ]
        print_table(("NAME", "MODE", "SUBNET", "STATE", "VMS", "CREATED"), rows)


@net_command.command("show")
@click.argument("network", type=NETWORK)
@format_option
def show(network: str, format: Format) -> None:
    """Tell all about a network, and which VMs are on it under which addresses.

    \b
    Example:
      atoll net show lab
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> tuple[NetworkInfo, set[str]]:
        return await host.networks.show(network), {each.name for each in await host.networks.groups.ls()}

    found, groups = perform(action, cancelled="")
    if format != "table":
        emit(found, format)
        return
    down = "its bridge isn't there" if found.network.bridge else "down; it comes up when a VM on it starts"
    cards = [_card(found, each, groups) for each in found.attached]
    pairs = [
        ("Name", found.network.name),
        ("Id", found.network.id),
        ("Mode", found.network.mode),
        ("State", "up" if found.up else down),
        ("Bridge", found.network.bridge),
        ("Subnet", found.network.subnet),
        ("IPv6", found.network.subnet6 or ""),
        ("Own address", found.network.gateway),
        ("Domain", found.network.domain),
        ("VMs", "\n".join(cards)),
        ("Trouble", "\n".join(found.troubles)),
    ]
    print_description([pair for pair in pairs if pair[1]])


def _card(info: NetworkInfo, card: Attached, groups: set[str]) -> str:
    vms = {each.mac: each.vm for each in info.attached}
    name = f"{card.vm}.{info.network.domain}" if info.network.domain else card.vm
    words = [name, card.address or "-", card.mac]
    words += [card.address6] if card.address6 else []
    words += [f"groups {'+'.join(card.groups)}"] if card.groups else []
    gone = [group for group in card.groups if group not in groups]
    words += [f"(gone, so they allow nothing: {', '.join(gone)})"] if gone else []
    words += [f"limit {format_rate(card.limit)}"] if card.limit else []
    words += [told(each, vms) for each in info.impairments if each.mac == card.mac]
    return "  ".join(words)


@net_command.command("rm")
@click.argument("networks", nargs=-1, required=True, type=NETWORK, metavar="NETWORK...")
@click.option("--force", "-f", is_flag=True, help="Also where VMs are on it: detach them.")
def rm(networks: tuple[str, ...], force: bool) -> None:
    """Remove networks, with all that they have on this computer.

    \b
    Example:
      atoll net rm lab
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        for each in networks:
            await host.networks.rm(each, force=force)

    perform(action)


@net_command.command("attach")
@click.argument("vm", type=VM)
@click.argument("network", type=NETWORK)
@click.option("--address", metavar="IP", help="Its address there (default: a free one).")
@click.option("--mac", help="The card's hardware address.")
@click.option("--group", "groups", type=GROUP, multiple=True, help="A security group. Repeatable.")
@click.option("--limit", metavar="RATE", default="0", help="What passes each way, such as 10Mbit (default: all).")
@format_option
def attach(vm: str, network: str, groups: tuple[str, ...], limit: str, format: Format, **options: str | None) -> None:
    """Give a VM a card on NETWORK, at once where it can be while the VM runs.

    \b
    Examples:
      atoll net attach web lab
      atoll net attach db lab --address 10.213.0.10 --group web
    """
    from atoll.cli.options import parse_rate
    from atoll.cli.session import perform

    request = NicRequest(network=network, groups=groups, limit=parse_rate(limit), **options)

    async def action(host: "AsyncHost") -> tuple[NicSpec, Change]:
        return await (await host.get(vm)).net_attach(request)

    nic, change = perform(action)
    if format == "table":
        tell_changes([change], format)
    else:
        emit({"nic": nic, "change": change}, format)


@net_command.command("set")
@click.argument("vm", type=VM)
@click.option("--network", type=NETWORK, help="On which network, when it is on several.")
@click.option("--group", "groups", type=GROUP, multiple=True, help="Security groups that it has then. Repeatable.")
@click.option("--no-groups", is_flag=True, help="None: VMs of the network reach it.")
@click.option("--limit", metavar="RATE", help="What passes each way, such as 10Mbit; 0 for all.")
@format_option
def set_card(
    vm: str, network: str | None, groups: tuple[str, ...], no_groups: bool, limit: str | None, format: Format
) -> None:
    """Give a VM's card other security groups or another limit. They hold at once.

    \b
    Examples:
      atoll net set web --group web --group ssh
      atoll net set web --network lab --limit 10Mbit
      atoll net set web --no-groups
    """
    from atoll.cli.options import parse_rate
    from atoll.cli.session import perform

    if (groups and no_groups) or not (groups or no_groups or limit is not None):
        raise InvalidInput("what shall hold for the card?", next_step="Say --group or else --no-groups, or --limit.")
    request = NicSetRequest(
        network=network,
        groups=groups if groups or no_groups else None,
        limit=None if limit is None else parse_rate(limit),
    )

    async def action(host: "AsyncHost") -> list[Change]:
        return await (await host.get(vm)).net_set(request)

    tell_changes(perform(action), format)


@net_command.command("detach")
@click.argument("vm", type=VM)
@click.argument("network", type=NETWORK)
@format_option
def detach(vm: str, network: str, format: Format) -> None:
    """Take a VM's card on NETWORK away, at once where the guest lets go of it.

    \b
    Example:
      atoll net detach web lab
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Change:
        return await (await host.get(vm)).net_detach(network)

    tell_changes([perform(action)], format)


for _command in (capture, exec_inside, impair):
    net_command.add_command(_command)
