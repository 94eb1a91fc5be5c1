"""Programs of this computer inside a network: they reach its VMs, by their names, and nothing else than these do."""

import os
from collections.abc import Sequence

from atoll.errors import InvalidInput, Unsupported
from atoll.model.network import Network
from atoll.model.vm import ExecResult
from atoll.operations.networks import locked, up
from atoll.operations.services import Services

_NAMES = """
run=$1
shift
for file in resolv.conf nsswitch.conf; do
    [ ! -e /etc/$file ] || mount --bind "$run/$file" /etc/$file || exit 125
done
exec "$@"
"""
"""In a mount namespace of its own. `nsswitch.conf` because a resolver of this computer's would be asked before ours."""


async def command_line(network: Network, command: Sequence[str], *, services: Services) -> list[str]:
    """What to run here so that `command` runs in the network, which is brought up for that. An ordinary user is root
    there, with no more rights over files than ever. Raises `InvalidInput`, `NetworkFailed`, `MissingTool`.
    """
    from atoll.host import namespace, process
    from atoll.host import network as world

    if not command:
        raise InvalidInput("there is no command to run", next_step="Write it after `--`.")
    if network.mode == "bridge":
        raise Unsupported(
            f"'{network.name}' is no room of its own",
            f"this computer is on its bridge {network.bridge} itself",
            "Run the program as it is.",
        )
    async with locked(services, [network.id]):
        paths = services.layout.network(network.id)
        holder = await up(services, network)
        world.write_resolver(network, paths)
    # Root stays who he is, with all of this computer's users; an ordinary user may enter nothing without the other.
    own_user = os.geteuid() != 0
    inside = namespace.entered(holder, user=own_user)
    shell = [process.find("unshare"), "--mount", "--", process.find("sh"), "-c", _NAMES, "atoll", str(paths.run)]
    return [*inside, *shell, *command]


async def execute(
    network: Network, command: Sequence[str], *, services: Services, stdin: bytes | None = None
) -> ExecResult:
    """Run a program there to its end. Raises what `command_line` does."""
    from atoll.host import process

    words = await command_line(network, command, services=services)
    ended = await process.run(words, stdin=stdin, check=False)
    return ExecResult(exit_code=ended.exit_code, stdout=ended.stdout, stderr=ended.stderr)
