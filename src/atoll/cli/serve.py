"""`serve`: the agent of this computer."""

import asyncio
import logging
from typing import TYPE_CHECKING, Literal

import click

from atoll.cli.failures import note

if TYPE_CHECKING:
    from atoll.model.pressure import PressurePolicy


@click.command("serve")
@click.option(
    "--listen",
    "-l",
    multiple=True,
    metavar="ADDRESS:PORT",
    help="Serve other computers there, over TLS; `:8443` is on all addresses. May be given several times.",
)
@click.option(
    "--name", "-n", multiple=True, metavar="NAME", help="A name or address that others reach this computer by."
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=5000,
    show_default=True,
    help="How many requests a second one client may send; 0 for any number.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: each entry is a line of JSON, and each task has one.",
)
@click.option(
    "--memory-overcommit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="RATIO",
    help="Start no VM that would make the memory of all more than so many times the computer's. No limit by default.",
)
@click.option(
    "--memory-reserve",
    metavar="SIZE",
    help="What of its memory the computer has for itself (default: a sixteenth, 256MiB to 4GiB, for what runs).",
)
@click.option(
    "--on-memory-pressure",
    type=click.Choice(["suspend", "balloon", "nothing"]),
    default="suspend",
    show_default=True,
    help="What is done when less than that is available: VMs are suspended, only their balloons moved, or nothing.",
)
@click.option(
    "--merge-pages",
    is_flag=True,
    help="Root only: let the kernel merge equal pages of VMs' memory (KSM). What one guest has in memory, another can "
    "find out by timing then; VMs with --isolation strict stay apart.",
)
@click.option("--install", is_flag=True, help="Write systemd units that serve from now on, with the other options.")
@click.option("--uninstall", is_flag=True, help="Remove those units.")
@click.option("--user", is_flag=True, help="With --install and --uninstall: root's own systemd, not the system's.")
@click.pass_context
def serve_command(
    ctx: click.Context,
    listen: tuple[str, ...],
    name: tuple[str, ...],
    rate: float,
    log_format: Literal["text", "json"],
    memory_overcommit: float | None,
    memory_reserve: str | None,
    on_memory_pressure: "PressurePolicy",
    merge_pages: bool,
    install: bool,
    uninstall: bool,
    user: bool,
) -> None:
    """Watch over this computer's VMs, and serve its HTTP API, until it is ended.

    Local commands go through it while it runs. A VM that runs doesn't depend on it. It starts again what ended by
    itself (`atoll set VM --restart`), and what is marked for this computer's boot (`--autostart`). Other computers
    reach it with --listen only, and need a token (`atoll token`).

    \b
    Examples:
      atoll serve
      atoll serve --install
      atoll serve --memory-overcommit 1.5 --memory-reserve 2GiB
      atoll serve --merge-pages
      atoll serve --on-memory-pressure balloon
      atoll serve --listen :8443 --name vms.example.org
      curl --unix-socket ~/.local/share/atoll/run/agent.sock http://atoll/v1/vms
    """
    if install or uninstall:
        from atoll.cli import install as units

        if install and uninstall:
            raise click.UsageError("--install and --uninstall don't go together")
        units.install(ctx, user=user) if install else units.uninstall(user=user)
        return
    from atoll import layout
    from atoll.agent import logs
    from atoll.agent.serve import Options, serve
    from atoll.model.units import parse_size

    logs.configure(log_format)
    tell = note if log_format == "text" else logging.getLogger("atoll.agent").info

    def ready(shown: list[str]) -> None:
        for each in reversed(shown):
            tell(f"listening on {each}")

    options = Options(
        addresses=listen,
        names=name,
        rate=rate,
        overcommit=memory_overcommit,
        reserve=None if memory_reserve is None else parse_size(memory_reserve),
        on_memory_pressure=on_memory_pressure,
        merge_pages=merge_pages,
    )
    asyncio.run(serve(layout.find(), options, ready=ready))
