"""`start`, `stop`, `restart`, `pause`, `resume`, `rm`, `rename`, `wait`."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from atoll.cli.failures import Format, note
from atoll.cli.options import DURATION, VM
from atoll.cli.output import emit, format_option

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost, AsyncVm

F = TypeVar("F", bound=Callable[..., Any])


def _several(function: F) -> F:
    """The names of several VMs, and `--format`."""
    return click.argument("vms", metavar="VM...", nargs=-1, required=True, type=VM)(format_option(function))


def do_to_all(
    vms: Sequence[str],
    format: Format,
    title: str,
    act: "Callable[[AsyncVm], Awaitable[dict[str, Any] | None]]",
    told: Callable[[dict[str, Any]], str] = lambda done: "",
) -> int:
    """Do it to all of them at once; the exit code. JSON and YAML list those that went well, with what `act` returns.

    For people there is a note about each where `told` has one.
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import each_vm, perform

    async def action(host: "AsyncHost") -> tuple[list[dict[str, Any]], int]:
        with Shown(f"{title} {', '.join(vms[:3])}{' …' if len(vms) > 3 else ''}"):
            return await each_vm(host, vms, act)

    done, code = perform(action)
    if format != "table":
        emit(done, format)
        return code
    for text in filter(None, map(told, done)):
        note(text)
    return code


@click.command("start")
@_several
@click.option("--wait", is_flag=True, help="Wait until it is ready, not only started.")
@click.option("--timeout", type=DURATION, help="With --wait: how long at most, such as 2m.")
def start_command(vms: tuple[str, ...], wait: bool, timeout: float | None, format: Format) -> int:
    """Start VMs.

    \b
    Examples:
      atoll start web
      atoll start --wait web db
    """
    return do_to_all(vms, format, "starting", lambda vm: vm.start(wait=wait, timeout=timeout))


@click.command("stop")
@click.argument("vms", metavar="VM...", nargs=-1, type=VM)
@format_option
@click.option("--all", "every", is_flag=True, help="All that run, the highest boot order first.")
@click.option("--suspend", is_flag=True, help="With --all: keep their memory on the disk where there is time for it.")
@click.option("--force", "-f", is_flag=True, help="Switch it off at once, as pulling the plug would.")
@click.option("--timeout", "-t", type=DURATION, default="60s", help="How long it has to shut down; then it is forced.")
def stop_command(vms: tuple[str, ...], every: bool, suspend: bool, force: bool, timeout: float, format: Format) -> int:
    """Shut VMs down: the guest agent is asked, then the power button pressed, then the VM switched off.

    With --all the time is for all of them together.

    \b
    Examples:
      atoll stop web
      atoll stop --timeout 2m web db
      atoll stop --force web
      atoll stop --all --timeout 90s
    """
    if every != (not vms) or (suspend and not every):
        raise click.UsageError("name VMs, or use --all, and --suspend only with that")
    if every:
        from atoll.cli.shutdown import stop_all

        return stop_all(timeout=0.0 if force else timeout, suspend=suspend, for_shutdown=False, format=format)
    return do_to_all(vms, format, "stopping", lambda vm: vm.stop(force=force, timeout=timeout))


@click.command("restart")
@_several
@click.option("--force", "-f", is_flag=True, help="Don't shut it down first.")
@click.option("--timeout", "-t", type=DURATION, default="60s", help="How long it has to shut down; then it is forced.")
def restart_command(vms: tuple[str, ...], force: bool, timeout: float, format: Format) -> int:
    """Stop VMs and start them again; settings that waited for the next start hold from then on.

    \b
    Example:
      atoll restart web
    """
    return do_to_all(vms, format, "restarting", lambda vm: vm.restart(force=force, timeout=timeout))


@click.command("pause")
@_several
def pause_command(vms: tuple[str, ...], format: Format) -> int:
    """Halt VMs where they are; they keep their memory.

    \b
    Example:
      atoll pause web
    """
    return do_to_all(vms, format, "pausing", lambda vm: vm.pause())


@click.command("resume")
@_several
def resume_command(vms: tuple[str, ...], format: Format) -> int:
    """Let paused and suspended VMs go on.

    \b
    Example:
      atoll resume web
    """
    return do_to_all(vms, format, "resuming", lambda vm: vm.resume())


@click.command("rm")
@_several
@click.option(
    "--force", "-f", is_flag=True, help="Also one that runs: it is switched off first. Snapshots go in any case."
)
def rm_command(vms: tuple[str, ...], force: bool, format: Format) -> int:
    """Remove VMs with their disks and snapshots. Images stay, and so do clones and forks.

    \b
    Examples:
      atoll rm web
      atoll rm --force web db
    """

    async def remove(vm: "AsyncVm") -> dict[str, Any]:
        return {"snapshots": await vm.rm(force=force)}

    def told(done: dict[str, Any]) -> str:
        count = done["snapshots"]
        return f"{count} snapshot{'s' if count > 1 else ''} of '{done['name']}' went with it." if count else ""

    return do_to_all(vms, format, "removing", remove, told)


@click.command("rename")
@click.argument("vm", type=VM)
@click.argument("name")
def rename_command(vm: str, name: str) -> None:
    """Give a VM another name. It may run; its guest learns the name at its next first boot only.

    \b
    Example:
      atoll rename web web-old
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        await (await host.get(vm)).rename(name)

    perform(action)


@click.command("wait")
@click.argument("vm", type=VM)
@click.option("--for", "condition", type=click.Choice(["ready", "stopped"]), help="What to wait for (default: ready).")
@click.option("--text", metavar="PATTERN", help="Wait until its serial line says this (a regular expression).")
@click.option("--timeout", type=DURATION, help="How long at most, such as 2m; exit code 8 after it.")
def wait_command(
    vm: str, condition: Literal["ready", "stopped"] | None, text: str | None, timeout: float | None
) -> None:
    """Wait until a VM is ready, has stopped, or has said something; print what was seen.

    Without a guest agent in it, a VM is ready when it runs.

    \b
    Examples:
      atoll wait web
      atoll wait web --for stopped --timeout 5m
      atoll wait web --text 'login:'
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform
    from atoll.errors import InvalidInput

    if condition and text is not None:
        raise InvalidInput("--for and --text can't go together", next_step="Leave one of them away.")

    async def action(host: "AsyncHost") -> str:
        with Shown(f"waiting for {vm}"):
            return await (await host.get(vm)).wait(condition, text=text, timeout=timeout)

    click.echo(perform(action, cancelled=""))
