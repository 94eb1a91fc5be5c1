"""`serve`: the agent of this computer."""

import asyncio
import logging
from typing import Literal

import click

from atoll.cli.failures import note


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
def serve_command(
    listen: tuple[str, ...], name: tuple[str, ...], rate: float, log_format: Literal["text", "json"]
) -> None:
    """Watch over this computer's VMs, and serve its HTTP API, until it is ended.

    Local commands go through it while it runs. A VM that runs doesn't depend on it. Other computers reach it with
    --listen only, and need a token (`atoll token`).

    \b
    Examples:
      atoll serve
      atoll serve --listen :8443 --name vms.example.org
      curl --unix-socket ~/.local/share/atoll/run/agent.sock http://atoll/v1/vms
    """
    from atoll import layout
    from atoll.agent import logs
    from atoll.agent.serve import serve

    logs.configure(log_format)
    tell = note if log_format == "text" else logging.getLogger("atoll.agent").info

    def ready(shown: list[str]) -> None:
        for each in reversed(shown):
            tell(f"listening on {each}")

    asyncio.run(serve(layout.find(), addresses=listen, names=name, rate=rate, ready=ready))
