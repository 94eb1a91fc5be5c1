"""`exec`: a command in the guest, its streams and exit code passed on as they are."""

from functools import partial
from typing import TYPE_CHECKING

import click

from atoll.cli.failures import OWN_FAILURE, settings
from atoll.cli.options import DURATION, VM, TakesCommand, parse_pairs, without_dashes
from atoll.cli.output import write_bytes
from atoll.errors import InvalidInput
from atoll.model.vm import ExecRequest

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost, AsyncVm


class _Exec(TakesCommand):
    takes_command_at_once = True


@click.command("exec", cls=_Exec)
@click.argument("vm", type=VM)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--interactive", "-i", is_flag=True, help="Give the command this standard input.")
@click.option("--tty", "-t", is_flag=True, help="Run it in a terminal.")
@click.option("--env", "-e", multiple=True, metavar="KEY=VALUE", help="An environment variable. Repeatable.")
@click.option("--cwd", "-w", "--workdir", metavar="FOLDER", help="The folder to run it in.")
@click.option("--user", "-u", help="The user to run it as (default: root).")
@click.option("--timeout", type=DURATION, help="Kill it after this time, such as 30s.")
def exec_command(
    vm: str,
    command: tuple[str, ...],
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    cwd: str | None,
    user: str | None,
    timeout: float | None,
) -> int:
    """Run a command in a VM and end with its exit code.

    Options stand before the VM's name, or before `--`. Atoll's own failures end with 125; 126 and 127 are the
    guest's: the command can't be executed, or isn't there.

    \b
    Examples:
      atoll exec web -- apt-get install -y nginx
      atoll exec web ls -l /srv
      tar c site | atoll exec -i web -- tar x -C /srv
      atoll exec -it web -- top
    """
    from atoll.platform.local import knock

    if settings().host is None:
        knock(vm)
    from atoll.cli.session import perform

    settings().own_failure = OWN_FAILURE
    words = without_dashes(command)
    if not words:
        raise InvalidInput("there is no command to run", next_step=f"Write it after `--`, or use `atoll shell {vm}`.")
    request = ExecRequest(argv=words, env=parse_pairs(env, option="--env"), cwd=cwd, user=user, timeout=timeout)

    async def action(host: "AsyncHost") -> int:
        found = await host.get(vm)
        if tty:
            return await run_in_terminal(found, request)
        return await run_streamed(found, request, interactive=interactive)

    return perform(action, cancelled="the command was killed")


async def run_streamed(vm: "AsyncVm", request: ExecRequest, *, interactive: bool) -> int:
    """Run it with our own streams; its exit code."""
    from atoll.cli.streams import standard_input

    result = await vm.exec(
        request,
        stdin=standard_input() if interactive else None,
        on_stdout=write_bytes,
        on_stderr=partial(write_bytes, to_errors=True),
    )
    return result.exit_code


async def run_in_terminal(vm: "AsyncVm", request: ExecRequest) -> int:
    """Run it in a terminal of the guest, attached to ours; its exit code where the terminal tells one."""
    from atoll.cli.attach import DETACH_KEYS, attach

    if request.timeout is not None:
        raise InvalidInput("--timeout and --tty can't go together", next_step="Leave one of them away.")
    terminal = await vm.shell(in_place(request), user=request.user)
    return await attach(terminal, keys=DETACH_KEYS, name=vm.name)


def in_place(request: ExecRequest) -> tuple[str, ...]:
    """The command with its environment and folder set by a shell, for a terminal, which takes a command only."""
    if not request.env and request.cwd is None:
        return request.argv
    script = 'cd -- "$0" && exec env "$@"'
    return (
        "sh", "-c", script, request.cwd or ".", *(f"{key}={value}" for key, value in request.env.items()), *request.argv
    )  # fmt: skip
