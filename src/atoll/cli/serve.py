"""`serve`: the agent of this computer."""

import asyncio

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
    "--memory-overcommit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="RATIO",
    help="Start no VM that would make the memory of all more than so many times the computer's. No limit by default.",
)
@click.option("--memory-reserve", default="0", metavar="SIZE", help="What of its memory the computer has for itself.")
def serve_command(
    listen: tuple[str, ...], name: tuple[str, ...], memory_overcommit: float | None, memory_reserve: str
) -> None:
    """Watch over this computer's VMs, and serve its HTTP API, until it is ended.

    Local commands go through it while it runs. A VM that runs doesn't depend on it. Other computers reach it with
    --listen only, and need a token (`atoll token`).

    \b
    Examples:
      atoll serve
      atoll serve --memory-overcommit 1.5 --memory-reserve 2GiB
      atoll serve --listen :8443 --name vms.example.org
      curl --unix-socket ~/.local/share/atoll/run/agent.sock http://atoll/v1/vms
    """
    from atoll import layout
    from atoll.agent.serve import serve

    def ready(shown: list[str]) -> None:
        for each in reversed(shown):
            note(f"listening on {each}")

    limit = None
    if memory_overcommit is not None:
        from atoll.model.units import parse_size
        from atoll.operations.promises import Promises

        limit = Promises(overcommit=memory_overcommit, reserve=parse_size(memory_reserve))
    asyncio.run(serve(layout.find(), addresses=listen, names=name, promises=limit, ready=ready))
