"""`serve`: the agent of this computer."""

import asyncio

import click

from atoll.cli.failures import note


@click.command("serve")
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=5000,
    show_default=True,
    help="How many requests a second one client may send; 0 for any number.",
)
def serve_command(rate: float) -> None:
    """Watch over this computer's VMs, and serve its HTTP API, until it is ended.

    Local commands go through it while it runs. A VM that runs doesn't depend on it.

    \b
    Examples:
      atoll serve
      curl --unix-socket ~/.local/share/atoll/run/agent.sock http://atoll/v1/vms
    """
    from atoll import layout
    from atoll.agent.serve import serve

    found = layout.find()
    asyncio.run(serve(found, rate=rate, ready=lambda: note(f"listening on {found.agent_socket}")))
