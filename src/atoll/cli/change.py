"""`set`: other hardware for a VM."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import click

from atoll.cli.failures import Format
from atoll.cli.options import VM, parse_pairs, with_limits, with_options
from atoll.cli.output import emit, format_option, print_table
from atoll.cli.supervise import supervision
from atoll.errors import InvalidInput
from atoll.model.isolation import IsolationLevel
from atoll.model.requests import SetRequest
from atoll.model.spec import AcceleratorChoice
from atoll.model.vm import Change

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.command("set")
@click.argument("vm", type=VM)
@click.option("--cpus", "-c", type=int, help="Virtual CPUs.")
@click.option("--max-cpus", type=int, help="How many it can be given while it runs.")
@click.option("--cpu-model", help="A CPU model of QEMU's.")
@click.option("--memory", "-m", metavar="SIZE", help="RAM, such as 2GiB.")
@click.option("--disk-size", metavar="SIZE", help="Size of the first disk; disks only grow.")
@click.option("--display", type=click.Choice(["none", "vga", "virtio"]), help="Its graphics card.")
@click.option("--accel", "accelerator", type=click.Choice(get_args(AcceleratorChoice)), help="What runs it.")
@click.option("--isolation", type=click.Choice(get_args(IsolationLevel)), help="How it is confined.")
@with_limits
@click.option("--cmdline", help="Added to its kernel's command line.")
@click.option("--agent/--no-agent", default=None, help="The guest agent was installed in it, or taken away.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Set a label. Repeatable.")
@click.option("--unlabel", "unlabels", multiple=True, metavar="KEY", help="Take a label away. Repeatable.")
@functools.partial(with_options, supervision(None))
@format_option
def set_command(vm: str, labels: tuple[str, ...], unlabels: tuple[str, ...], format: Format, **options: Any) -> None:
    """Change a VM: at once where that is possible while it runs, else at its next start. It says which.

    \b
    Examples:
      atoll set web --cpus 4 --memory 2GiB
      atoll set web --disk-size 40GiB
      atoll set web --cpu-limit 1.5 --io-limit 50MiB
      atoll set web --label tier=front --unlabel test
      atoll set web --restart on-failure --autostart --boot-order 10
      atoll set web --memory-min 512MiB --on-memory-pressure balloon
    """
    from atoll.cli.session import perform

    named: dict[str, str | None] = {**parse_pairs(labels, option="--label"), **dict.fromkeys(unlabels)}
    request = SetRequest(labels=named, **options)
    if request == SetRequest():
        raise InvalidInput("there is nothing to set", next_step="Say what, such as `--memory 2GiB`.")

    async def action(host: "AsyncHost") -> list[Change]:
        return await (await host.get(vm)).set(request)

    tell_changes(perform(action), format)


def tell_changes(changes: Sequence[Change], format: Format) -> None:
    """What was changed, and from when on it holds."""
    if format != "table":
        emit(changes, format)
        return
    when = {"now": "now", "next-start": "at the next start"}
    rows = [(each.name, each.value, when[each.when] + (f": {each.why}" if each.why else "")) for each in changes]
    print_table(("SETTING", "VALUE", "HOLDS"), rows)
