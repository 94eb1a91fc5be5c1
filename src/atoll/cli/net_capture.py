"""`net capture`: what passes through a VM's card, for tcpdump and Wireshark."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from atoll.cli.failures import Format, note
from atoll.cli.options import DURATION, NETWORK, VM
from atoll.cli.output import emit, format_option
from atoll.errors import InvalidInput, from_os_error
from atoll.model.requests import CaptureRequest

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.command("capture")
@click.argument("vm", type=VM)
@click.option("--network", type=NETWORK, help="On which network, when it is on several.")
@click.option("--nic", metavar="NAME", help="Which card, such as net0.")
@click.option("--write", "-w", "where", metavar="FILE", help="Where to (default: VM.pcap); `-` is standard output.")
@click.option("--count", "-c", type=click.IntRange(min=1), help="End after so many packets.")
@click.option("--seconds", type=DURATION, metavar="TIME", help="End after this time, such as 30s.")
@format_option
def capture(
    vm: str,
    network: str | None,
    nic: str | None,
    where: str | None,
    count: int | None,
    seconds: float | None,
    format: Format,
) -> None:
    """Write what passes through a VM's card into a pcap file, until Ctrl-C or until it stops.

    \b
    Examples:
      atoll net capture web
      atoll net capture web --network lab -c 100 -w lab.pcap
      atoll net capture web -w - | tcpdump -n -r -
    """
    from atoll.cli.session import cancelled_by_signals, perform

    to_output = where == "-"
    if to_output and sys.stdout.isatty():
        raise InvalidInput("a capture isn't for a terminal", next_step="Add `| tcpdump -n -r -`, or -w FILE.")
    request = CaptureRequest(network=network, nic=nic, count=count, seconds=seconds)
    lost: list[int] = []

    async def action(host: "AsyncHost") -> tuple[str, int]:
        import asyncio
        import contextlib

        found = await host.get(vm)
        path = Path(where or f"{found.name}.pcap")
        packets = -1
        file: BinaryIO | None = None
        with cancelled_by_signals(), contextlib.suppress(asyncio.CancelledError), contextlib.ExitStack() as stack:
            items = found.net_capture(request, on_lost=lost.append)
            async with contextlib.aclosing(items):  # type: ignore[type-var]  # they are generators
                async for item in items:
                    # The header comes when there is something to capture; before that no file is touched.
                    if file is None:
                        file = sys.stdout.buffer if to_output else stack.enter_context(_opened(path))
                    file.write(item)
                    packets += 1
                    if to_output:
                        file.flush()
        return str(path), max(packets, 0)

    path, packets = perform(action, cancelled="")
    if sum(lost):
        note(f"{sum(lost)} packets came too fast and aren't in it.")
    if to_output:
        return
    if format == "table":
        click.echo(f"{path}: {packets} packets")
    else:
        emit({"file": path, "packets": packets, "lost": sum(lost)}, format)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error
