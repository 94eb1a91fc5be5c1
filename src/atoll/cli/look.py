"""`logs`, `screenshot`, `type`, `key`: a VM as somebody sits in front of it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from atoll.cli.options import VM
from atoll.cli.output import write_bytes
from atoll.errors import InvalidInput, from_os_error

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.command("logs")
@click.argument("vm", type=VM)
@click.option("--follow", "-f", is_flag=True, help="Go on until it stops.")
@click.option("--tail", "-n", type=click.IntRange(min=0), help="Only the last lines.")
@click.option(
    "--source",
    type=click.Choice(["serial", "qemu", "events"]),
    default="serial",
    help="The guest's serial line (default), QEMU's messages, or QEMU's events.",
)
def logs_command(vm: str, follow: bool, tail: int | None, source: Literal["serial", "qemu", "events"]) -> None:
    """Print what a VM wrote, as it is.

    \b
    Examples:
      atoll logs web
      atoll logs --follow --tail 20 web
      atoll logs --source qemu web
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        found = await host.get(vm)
        async for chunk in found.logs(follow=follow, tail=tail, source=source):
            write_bytes(chunk)

    perform(action, cancelled="")


@click.command("screenshot")
@click.argument("vm", type=VM)
@click.argument("file")
def screenshot_command(vm: str, file: str) -> None:
    """Save a picture (PNG) of a VM's display; `-` is standard output.

    \b
    Examples:
      atoll screenshot web web.png
      atoll screenshot web - | display
    """
    from atoll.cli.session import perform

    if file == "-" and sys.stdout.isatty():
        raise InvalidInput("a picture can't be printed on a terminal", next_step="Name a file, or pipe it on.")

    async def action(host: "AsyncHost") -> bytes:
        return await (await host.get(vm)).screenshot()

    picture = perform(action, cancelled="")
    if file == "-":
        write_bytes(picture)
        return
    try:
        Path(file).write_bytes(picture)
    except OSError as error:
        raise from_os_error(error, f"write {file}") from error


@click.command("type")
@click.argument("vm", type=VM)
@click.argument("text")
@click.option("--enter", is_flag=True, help="Press Enter after it.")
def type_command(vm: str, text: str, enter: bool) -> None:
    """Type TEXT on a VM's keyboard (US layout).

    \b
    Example:
      atoll type web --enter root
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        found = await host.get(vm)
        await found.type(text)
        if enter:
            await found.key("ret")

    perform(action, cancelled="")


@click.command("key")
@click.argument("vm", type=VM)
@click.argument("keys", nargs=-1, required=True)
def key_command(vm: str, keys: tuple[str, ...]) -> None:
    """Press KEYS one after another. `ctrl-alt-delete` is a chord; the names are QEMU's: ret, esc, f2, up …

    \b
    Examples:
      atoll key web ret
      atoll key web down down ret
      atoll key web ctrl-alt-delete
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        await (await host.get(vm)).key(*keys)

    perform(action, cancelled="")
