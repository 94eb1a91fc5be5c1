"""`export` and `import`: a machine as one file."""

import sys
from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format, note
from atoll.cli.options import VM
from atoll.cli.output import emit, format_option

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost, AsyncVm


@click.command("export")
@click.argument("source", metavar="VM|VM@SNAPSHOT", type=VM)
@click.argument("file")
@click.option("--base", metavar="VM@SNAPSHOT|IMAGE", help="Leave out what this has: it is on the other side.")
@click.option("--disk-only", is_flag=True, help="Without the snapshot's memory.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def export_command(source: str, file: str, base: str | None, disk_only: bool, quiet: bool) -> None:
    """Write a VM, or one of its snapshots, into one file for `atoll import` on this or another computer.

    A snapshot goes with its memory. A VM is written as it is now, without memory; a running one as if its power had
    failed just now. FILE is a tar archive; `-` is standard output. What was in the VM is in it, secrets too.

    \b
    Examples:
      atoll export web web.atoll
      atoll export web@clean clean.atoll
      atoll export web@today today.atoll --base web@yesterday
      atoll export web - | ssh host2 atoll import -
      atoll export web - | zstd > web.atoll.zst
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform
    from atoll.errors import InvalidInput

    if file == "-" and sys.stdout.isatty():
        raise InvalidInput("a bundle isn't for a terminal", next_step="Name a file, or use a pipe.")

    async def action(host: "AsyncHost") -> None:
        with Shown(f"exporting {source}", quiet=quiet) as shown:
            target = sys.stdout.buffer if file == "-" else file
            await host.export(source, target, base=base, disk_only=disk_only, report=shown.report)

    perform(action)


@click.command("import")
@click.argument("file")
@click.argument("name", required=False)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def import_command(file: str, name: str | None, quiet: bool, format: Format) -> None:
    """Make a stopped VM of what `atoll export` wrote; print its name. `-` is standard input.

    Every byte is checked, and nothing is kept of a bundle that is damaged. The VM has an identity of its own, and what
    was exported as a snapshot: one with memory goes on with `atoll restore`. Layers that are here already are shared.
    Disks of other programs: `atoll image import`.

    \b
    Examples:
      atoll import web.atoll
      atoll import web.atoll web-2
      zstd -dc web.atoll.zst | atoll import -
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform
    from atoll.errors import InvalidInput

    if file == "-" and sys.stdin.isatty():
        raise InvalidInput("a bundle doesn't come from a terminal", next_step="Name a file, or use a pipe.")

    async def action(host: "AsyncHost") -> tuple["AsyncVm", list[str]]:
        with Shown(f"importing {file}", quiet=quiet) as shown:
            made = await host.import_bundle(sys.stdin.buffer if file == "-" else file, name, report=shown.report)
        return made, [share.guest_path for node in await made.history() for share in node.snapshot.spec.shares]

    made, left_out = perform(action)
    if left_out:
        note(
            f"What was shared with it at {', '.join(left_out)} was another computer's, and is left out. "
            f"`atoll share add {made.name} HERE:GUEST` shares folders of this one."
        )
    if format == "table":
        click.echo(made.name)
    else:
        emit({"id": made.id, "name": made.name}, format)
