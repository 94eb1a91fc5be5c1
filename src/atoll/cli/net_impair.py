"""`net impair`: cables that work badly, and what is told about them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from atoll.cli.options import DURATION, NETWORK, VM, parse_percent, parse_rate
from atoll.errors import InvalidInput
from atoll.model.network import Impairment, Relayed
from atoll.model.requests import ImpairRequest
from atoll.model.units import format_duration

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.command("impair")
@click.argument("vm", type=VM)
@click.option("--network", type=NETWORK, help="On which network, when it is on several.")
@click.option("--towards", type=VM, metavar="VM", help="Only between it and this one.")
@click.option("--delay", type=DURATION, metavar="TIME", default=0, help="How much later packets come, such as 50ms.")
@click.option("--jitter", type=DURATION, metavar="TIME", default=0, help="By how much that varies, such as 10ms.")
@click.option("--loss", metavar="PERCENT", default="0", help="Packets that are lost, such as 5%.")
@click.option("--duplicate", metavar="PERCENT", default="0", help="Packets that come twice.")
@click.option("--reorder", metavar="PERCENT", default="0", help="Packets that are overtaken by those behind them.")
@click.option("--rate", metavar="RATE", default="0", help="What passes, such as 10Mbit; more is lost.")
@click.option(
    "--partition", "others", type=VM, multiple=True, metavar="VM", help="It can't reach this one. Repeatable."
)
@click.option("--clear", is_flag=True, help="Mend it.")
def impair(
    vm: str,
    network: str | None,
    towards: str | None,
    delay: float,
    jitter: float,
    loss: str,
    duplicate: str,
    reorder: str,
    rate: str,
    others: tuple[str, ...],
    clear: bool,
) -> None:
    """Let a VM's cable work badly, to see what its programs do then. All but --partition happens in each direction.

    Each command takes the place of the one before, with --towards of the one before towards the same VM.

    \b
    Examples:
      atoll net impair db --partition web
      atoll net impair db --delay 50ms --jitter 10ms --loss 1%
      atoll net impair db --delay 200ms --towards web
      atoll net impair db --clear
    """
    from atoll.cli.session import perform

    nothing = ImpairRequest(network=network, towards=towards)
    request = ImpairRequest(
        network=network,
        towards=towards,
        delay=delay,
        jitter=jitter,
        loss=parse_percent(loss),
        duplicate=parse_percent(duplicate),
        reorder=parse_percent(reorder),
        rate=parse_rate(rate),
        cut_from=others,
    )
    if clear is (request != nothing):
        raise InvalidInput(
            "what shall the cable do?", next_step="Say --delay, --loss, --rate or --partition; or else --clear."
        )

    async def action(host: "AsyncHost") -> None:
        await (await host.get(vm)).net_impair(request)

    perform(action)


def told(impairment: Impairment, vms: Mapping[str, str]) -> str:
    """What a cable does wrong, in a line: `delay 50ms ± 10ms, loss 1%; towards web: delay 200ms`."""
    general = next((each for each in impairment.relayed if each.peer is None), Relayed())
    parts = _of_relay(general, impairment.loss)
    parts += [f"rate {impairment.rate * 8 / 10**6:g}Mbit"] if impairment.rate else []
    parts += [f"cut from {vms.get(mac, mac)}" for mac in impairment.cut_from]
    pairs = [
        f"towards {vms.get(each.peer, each.peer)}: {', '.join(_of_relay(each, each.loss))}"
        for each in impairment.relayed
        if each.peer is not None
    ]
    return "; ".join([*([", ".join(parts)] if parts else []), *pairs])


def _of_relay(relayed: Relayed, loss: float) -> list[str]:
    jitter = f" ± {format_duration(relayed.jitter)}" if relayed.jitter else ""
    parts = [f"delay {format_duration(relayed.delay)}{jitter}"] if relayed.delay else []
    shares = {"loss": loss, "duplicate": relayed.duplicate, "reorder": relayed.reorder}
    return [*parts, *(f"{name} {share:g}%" for name, share in shares.items() if share)]
