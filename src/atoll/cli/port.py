"""`port add`, `port ls`, `port rm` (and `port forward`): a guest's ports on this computer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import click

from atoll.cli.failures import Format
from atoll.cli.forward import forward
from atoll.cli.options import VM, parse_ports
from atoll.cli.output import emit, format_option, print_table
from atoll.errors import InvalidInput
from atoll.model.spec import PortSpec

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.group("port")
def port_command() -> None:
    """Publish ports of a VM, list them, take them back; while it runs, too.

    \b
    Example:
      atoll port add web 8080:80
    """


port_command.add_command(forward)


def _print(ports: Sequence[PortSpec], format: Format) -> None:
    if format != "table":
        emit(ports, format)
        return
    rows = [(f"{port.host_address}:{port.host_port}", str(port.guest_port), port.protocol) for port in ports]
    print_table(("HERE", "GUEST", "PROTOCOL"), rows)


@port_command.command("add")
@click.argument("vm", type=VM)
@click.argument("ports", nargs=-1, required=True, metavar="[ADDRESS:]HOST:GUEST[/tcp|udp]...")
@format_option
def add(vm: str, ports: tuple[str, ...], format: Format) -> None:
    """Publish ports of a VM.

    \b
    Examples:
      atoll port add web 8080:80
      atoll port add web 0.0.0.0:8443:443 5353:53/udp
    """
    from atoll.cli.session import perform

    wanted = [port for text in ports for port in parse_ports(text)]

    async def action(host: "AsyncHost") -> list[PortSpec]:
        found = await host.get(vm)
        return [await found.publish(port) for port in wanted]

    _print(perform(action), format)


@port_command.command("ls")
@click.argument("vm", type=VM)
@format_option
def ls(vm: str, format: Format) -> None:
    """List a VM's published ports.

    \b
    Example:
      atoll port ls web
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[PortSpec]:
        return await (await host.get(vm)).ports()

    _print(perform(action, cancelled=""), format)


@port_command.command("rm")
@click.argument("vm", type=VM)
@click.argument("ports", nargs=-1, required=True, metavar="HOST[/tcp|udp]...")
def rm(vm: str, ports: tuple[str, ...]) -> None:
    """Take published ports back; they are named by their number on this computer.

    \b
    Example:
      atoll port rm web 8080 5353/udp
    """
    from atoll.cli.session import perform

    wanted = [_host_port(text) for text in ports]

    async def action(host: "AsyncHost") -> None:
        found = await host.get(vm)
        for port, protocol in wanted:
            await found.unpublish(port, protocol=protocol)

    perform(action)


def _host_port(text: str) -> tuple[int, Literal["tcp", "udp"]]:
    number, _, protocol = text.partition("/")
    if not number.isdecimal() or protocol not in ("", "tcp", "udp"):
        raise InvalidInput(f"'{text}' is no port", next_step="Write its number here, such as 8080 or 5353/udp.")
    return int(number), "udp" if protocol == "udp" else "tcp"
