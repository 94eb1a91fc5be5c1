"""`top`: what running VMs use, live."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.failures import Format
from atoll.cli.options import DURATION, VM
from atoll.cli.output import emit, emit_line, format_option, table_lines, terminal_width
from atoll.errors import AtollError, InvalidInput
from atoll.model.state import Phase
from atoll.model.units import format_size
from atoll.model.vm import HostMemory, Stats

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost, AsyncVm

_HOME_AND_CLEAR = "\x1b[H\x1b[J"
_FIRST_GLANCE = 0.5
"""Seconds between the two readings that a first rate takes."""
Reading = tuple["AsyncVm", Stats]


@click.command("top")
@click.argument("vms", nargs=-1, type=VM, metavar="[VM]...")
@click.option("--once", is_flag=True, help="One reading, then end.")
@click.option("--cards", is_flag=True, help="What passes through each network card, a row each.")
@click.option("--host", "of_host", is_flag=True, help="The computer's memory: promised, used, shared, saved, merged.")
@click.option("--interval", type=DURATION, default="2s", help="Time between readings (default: 2s).")
@format_option
def top_command(vms: tuple[str, ...], once: bool, cards: bool, of_host: bool, interval: float, format: Format) -> None:
    """Show what running VMs use: CPU, memory, disk and network. JSON is one reading of one VM a line.

    \b
    Examples:
      atoll top
      atoll top --once web
      atoll top --cards
      atoll top --host --once
      atoll top --format json --interval 10s
    """
    from atoll.cli.session import perform

    if interval <= 0:
        raise InvalidInput("the interval has to be longer than nothing", next_step="Write it like --interval 2s.")

    if of_host and (vms or cards):
        raise InvalidInput("--host is about all VMs together", next_step="Leave the names and --cards away.")

    async def action(host: "AsyncHost") -> None:
        if of_host:
            await _watch_host(host, once=once, interval=interval, format=format)
            return
        if format == "table":
            await _watch(host, vms, once=once, cards=cards, interval=interval)
            return
        while True:
            readings = [_told(reading) for reading in await _read(host, vms)]
            for reading in readings:
                emit_line(reading) if format == "json" else emit([reading], format)
            if once:
                return
            await asyncio.sleep(interval)

    perform(action, cancelled="")


def _told(reading: Reading) -> dict[str, Any]:
    import msgspec

    vm, stats = reading
    return {"id": vm.id, "name": vm.name, **msgspec.to_builtins(stats)}


async def _read(host: "AsyncHost", references: Sequence[str]) -> list[Reading]:
    """A reading of each VM: those that are named (they have to run), else all that run."""
    if references:
        named = [await host.get(each) for each in references]
        return [(vm, await vm.stats()) for vm in named]
    running = [await host.get(info.vm.id) for info in await host.ls() if info.phase in (Phase.RUNNING, Phase.PAUSED)]
    found = await asyncio.gather(*(vm.stats() for vm in running), return_exceptions=True)
    for each in found:
        # One that stopped between the two looks isn't a failure of `top`.
        if isinstance(each, BaseException) and not isinstance(each, AtollError):
            raise each
    return [(vm, stats) for vm, stats in zip(running, found, strict=True) if isinstance(stats, Stats)]


async def _watch(host: "AsyncHost", references: Sequence[str], *, once: bool, cards: bool, interval: float) -> None:
    before = {vm.id: stats for vm, stats in await _read(host, references)}
    networks = {each.network.id: each.network.name for each in await host.networks.ls()} if cards else {}
    await asyncio.sleep(_FIRST_GLANCE)
    while True:
        readings = await _read(host, references)
        headers, rows = _by_card(readings, before, networks) if cards else _by_vm(readings, before)
        screen = not once and sys.stdout.isatty()
        click.echo((_HOME_AND_CLEAR if screen else "") + "\n".join(table_lines(headers, rows, terminal_width())))
        sys.stdout.flush()
        if once:
            return
        before = {vm.id: stats for vm, stats in readings}
        await asyncio.sleep(interval)


async def _watch_host(host: "AsyncHost", *, once: bool, interval: float, format: Format) -> None:
    while True:
        now = await host.memory()
        if format == "table":
            lines = table_lines(*_of_host(now), terminal_width())
            screen = not once and sys.stdout.isatty()
            click.echo((_HOME_AND_CLEAR if screen else "") + "\n".join(lines))
            sys.stdout.flush()
        else:
            emit_line(now) if format == "json" else emit(now, format)
        if once:
            return
        await asyncio.sleep(interval)


def _of_host(now: HostMemory) -> "Table":
    """Columns about merged pages are there when some are, those about short memory when an agent watches over it."""
    headers: tuple[str, ...] = ("VMS", "PROMISED", "USED", "SHARED", "SAVED", "AVAILABLE", "OF")
    sizes = (now.promised, now.used, now.shared, now.saved, now.available, now.total)
    row: tuple[str, ...] = (str(now.vms), *map(format_size, sizes))
    if now.merging or now.merged:
        headers += ("MERGED",)
        row += (format_size(now.merged),)
    if now.reserve or now.asleep:
        headers += ("RESERVE", "HELD BACK", "ASLEEP")
        row += (format_size(now.reserve) + (" (low)" if now.low else ""), format_size(now.held_back), str(now.asleep))
    return headers, [row]


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _by_vm(readings: Sequence[Reading], before: Mapping[str, Stats]) -> Table:
    headers = ("NAME", "CPU", "MEMORY", "OF", "READ/S", "WRITTEN/S", "RECEIVED", "SENT")
    return headers, [_row(vm.name, stats, before.get(vm.id)) for vm, stats in readings]


def _by_card(readings: Sequence[Reading], before: Mapping[str, Stats], networks: Mapping[str, str]) -> Table:
    """Bytes a second, and the sums of bytes and packets since the card's cable is there."""
    headers = ("NAME", "CARD", "NETWORK", "RECEIVED/S", "SENT/S", "RECEIVED", "SENT", "PACKETS", "PACKETS SENT")
    rows: list[tuple[str, ...]] = []
    for vm, stats in readings:
        old = before.get(vm.id)
        known = {card.nic: card for card in old.cards} if old is not None else {}
        for card in stats.cards:
            network = networks.get(card.network or "", "-") if card.network is not None else "user"
            then, seconds = known.get(card.nic), stats.at - (old.at if old is not None else 0)
            rates = ("-", "-")
            if then is not None and seconds > 0:
                gone = (card.received - then.received, card.sent - then.sent)
                rates = (format_size(max(0, gone[0]) / seconds), format_size(max(0, gone[1]) / seconds))
            sums = (format_size(card.received), format_size(card.sent))
            rows.append((vm.name, card.nic, network, *rates, *sums, str(card.packets_received), str(card.packets_sent)))
    return headers, rows


def _row(name: str, now: Stats, before: Stats | None) -> tuple[str, ...]:
    """One VM's line; rates since `before`, which must be of the same run."""
    seconds = now.at - before.at if before is not None else 0
    if before is None or seconds <= 0 or now.cpu_seconds < before.cpu_seconds:
        cpu = read = written = "-"
    else:
        cpu = f"{(now.cpu_seconds - before.cpu_seconds) / seconds:.0%}"
        read = format_size(max(0, now.disk_read - before.disk_read) / seconds)
        written = format_size(max(0, now.disk_written - before.disk_written) / seconds)
    received = "-" if now.net_received is None else format_size(now.net_received)
    sent = "-" if now.net_sent is None else format_size(now.net_sent)
    return (name, cpu, format_size(now.memory_resident), format_size(now.memory_given), read, written, received, sent)
