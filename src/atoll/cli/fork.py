"""`fork`, `suspend` and `pool`: running copies, machines that sleep on the disk, copies that wait."""

from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format
from atoll.cli.options import VM, VM_OR_SNAPSHOT
from atoll.cli.output import emit, format_option, print_table

if TYPE_CHECKING:
    from atoll.model.vm import PoolInfo
    from atoll.platform.api import AsyncHost, AsyncVm


@click.command("fork")
@click.argument("source", metavar="VM|VM@SNAPSHOT", type=VM_OR_SNAPSHOT)
@click.option("--count", "-n", type=int, default=1, show_default=True, help="How many copies.")
@click.option("--name", help="Their name; {n} in it is a copy's number. [default: VM-{n}]")
@click.option("--pool", is_flag=True, help="Take one that waits in the snapshot's pool (`atoll pool create`).")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def fork_command(source: str, count: int, name: str | None, pool: bool, quiet: bool, format: Format) -> None:
    """Start copies of a running VM, or of a snapshot with memory; print their names.

    They go on from the same instant, share its memory until they write it, and the VM itself runs on. Ports aren't
    published for them: `atoll port add` does that.

    \b
    Examples:
      atoll fork web -n 10 --name 'try-{n}'
      atoll fork web@clean
      atoll fork web@clean --pool --name now
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform
    from atoll.errors import InvalidInput

    if pool and (name is None or count != 1):
        raise InvalidInput("--pool takes one copy, under a name", next_step="Give it with --name.")

    async def action(host: "AsyncHost") -> "list[AsyncVm]":
        if pool:
            return [await host.pools.take(source, str(name))]
        with Shown(f"forking {source}", quiet=quiet) as shown:
            return await host.fork(source, count, name=name, report=shown.report)

    made = perform(action)
    if format != "table":
        emit([{"id": vm.id, "name": vm.name} for vm in made], format)
        return
    for vm in made:
        click.echo(vm.name)


@click.command("suspend")
@click.argument("vms", metavar="VM...", nargs=-1, required=True, type=VM)
@format_option
def suspend_command(vms: tuple[str, ...], format: Format) -> int:
    """Write VMs' memory to the disk and end their processes; `atoll resume` and `atoll start` go on from there.

    \b
    Example:
      atoll suspend web
    """
    from atoll.cli.lifecycle import do_to_all

    return do_to_all(vms, format, "suspending", lambda vm: vm.suspend())


@click.group("pool")
def pool_command() -> None:
    """Keep copies of a snapshot started and waiting, so that `fork --pool` has one in a moment.

    \b
    Example:
      atoll pool create web@clean --ready 5
    """


@pool_command.command("create")
@click.argument("snapshot", metavar="VM@SNAPSHOT", type=VM_OR_SNAPSHOT)
@click.option("--ready", type=int, required=True, help="How many wait; what is lacking is started.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def create(snapshot: str, ready: int, quiet: bool, format: Format) -> None:
    """Start copies until so many wait; print how many were started. Do it again to fill a pool up.

    \b
    Example:
      atoll pool create web@clean --ready 5
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> int:
        with Shown(f"filling the pool of {snapshot}", quiet=quiet) as shown:
            return await host.pools.fill(snapshot, ready, report=shown.report)

    started = perform(action)
    if format == "table":
        click.echo(started)
    else:
        emit({"started": started}, format)


@pool_command.command("ls")
@format_option
def list_pools(format: Format) -> None:
    """List pools with the copies that wait.

    \b
    Example:
      atoll pool ls
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "list[PoolInfo]":
        return await host.pools.ls()

    found = perform(action)
    if format != "table":
        emit(found, format)
        return
    print_table(("SNAPSHOT", "READY", "NAMES"), [(p.name, str(len(p.ready)), ", ".join(p.ready)) for p in found])


@pool_command.command("rm")
@click.argument("snapshot", metavar="VM@SNAPSHOT", type=VM_OR_SNAPSHOT)
@format_option
def rm(snapshot: str, format: Format) -> None:
    """Remove the copies that wait; print how many there were.

    \b
    Example:
      atoll pool rm web@clean
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> int:
        return await host.pools.rm(snapshot)

    removed = perform(action)
    if format == "table":
        click.echo(removed)
    else:
        emit({"removed": removed}, format)
