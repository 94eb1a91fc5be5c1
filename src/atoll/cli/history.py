"""`snapshot`, `history`, `restore`, `forget` and `clone`: a machine treated like a commit."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import click

from atoll.cli.failures import Format
from atoll.cli.options import SNAPSHOT, VM, VM_OR_SNAPSHOT
from atoll.cli.output import age, emit, format_option, format_option_with, print_table
from atoll.model.units import format_size

if TYPE_CHECKING:
    from atoll.model.snapshot import HistoryNode, Snapshot
    from atoll.platform.api import AsyncHost, AsyncVm


@click.command("snapshot")
@click.argument("vm", type=VM)
@click.argument("name", required=False)
@click.option("--message", "-m", default="", help="What it is of, for people.")
@click.option("--disk-only", is_flag=True, help="Without memory: restoring it boots the VM.")
@click.option("--quiesce", is_flag=True, help="With --disk-only: freeze the guest's file systems for that moment.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def snapshot_command(
    vm: str, name: str | None, message: str, disk_only: bool, quiesce: bool, quiet: bool, format: Format
) -> None:
    """Keep this instant of a VM: disks, machine and, if it runs, memory; print the snapshot's name.

    The VM runs on, but for some milliseconds. Without NAME it is snap-1, snap-2 and so on.

    \b
    Examples:
      atoll snapshot web before-upgrade
      atoll snapshot web -m 'all tests pass'
      atoll snapshot db nightly --disk-only --quiesce
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "Snapshot":
        found = await host.get(vm)
        with Shown(f"keeping {vm}", quiet=quiet) as shown:
            return await found.snapshot(
                name, message=message, disk_only=disk_only, quiesce=quiesce, report=shown.report
            )

    taken = perform(action)
    if format == "table":
        click.echo(taken.name)
    else:
        emit(taken, format)


@click.command("history")
@click.argument("vm", type=VM)
@format_option_with("dot")
def history_command(vm: str, format: Literal["table", "json", "yaml", "dot"]) -> None:
    """Draw a VM's snapshots as a tree, with what each takes and which VMs stand on it.

    \b
    Examples:
      atoll history web
      atoll history web --format json
      atoll history web --format dot | dot -Tsvg > web.svg
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "tuple[str, list[HistoryNode]]":
        found = await host.get(vm)
        return found.name, await found.history()

    name, nodes = perform(action, cancelled="")
    if format == "dot":
        from atoll.cli.graph import dot

        click.echo("\n".join(dot(name, nodes)))
        return
    if format != "table":
        emit(nodes, format)
        return
    rows = [(line + node.snapshot.name, *_row(node)) for line, node in tree(nodes)]
    print_table(("SNAPSHOT", "AGE", "HAS", "OWN", "SHARED", "VMS HERE", "MESSAGE"), rows)


def _row(node: "HistoryNode") -> tuple[str, ...]:
    snapshot = node.snapshot
    return (
        age(snapshot.created_at),
        "memory" if snapshot.memory is not None else "disks",
        format_size(node.own),
        format_size(node.shared),
        ", ".join(node.heads) or "-",
        snapshot.message or "-",
    )


def tree(nodes: "Sequence[HistoryNode]") -> "Iterable[tuple[str, HistoryNode]]":
    """Each node below its parent, with the lines that lead to it. A node whose parent isn't there is a root."""
    known = {node.snapshot.id for node in nodes}
    children: dict[str | None, list[HistoryNode]] = {}
    for node in nodes:
        parent = node.snapshot.parent
        children.setdefault(parent if parent in known else None, []).append(node)
    # A stack, not recursion: a history may be thousands long.
    stack = [("", "", node) for node in reversed(children.get(None, []))]
    while stack:
        before, mark, node = stack.pop()
        yield before + mark, node
        below = children.get(node.snapshot.id, [])
        # One child goes on in the same column; several get lines of their own.
        after = before + {"": "", "├─ ": "│  ", "└─ ": "   "}[mark]
        marks = [""] if len(below) == 1 else ["├─ "] * (len(below) - 1) + ["└─ "]
        stack += [(after, mark, child) for mark, child in reversed(list(zip(marks, below, strict=False)))]


@click.command("restore")
@click.argument("vm", type=VM, required=False)
@click.argument("snapshot", type=SNAPSHOT, required=False)
@click.option("--from", "folder", metavar="DIR", help="A backup from this folder, as a new VM.")
@click.option("--keep", is_flag=True, help="Take a snapshot of the present first.")
@click.option("--disk-only", is_flag=True, help="Leave its memory; a VM that runs is booted.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def restore_command(
    vm: str | None, snapshot: str | None, folder: str | None, keep: bool, disk_only: bool, quiet: bool
) -> None:
    """Make a VM what it was; with memory its guest simply goes on from there, else a running VM is booted.

    The present is lost, unless --keep takes a snapshot of it first. If the restore fails, the VM is as it was.

    With --from DIR a new, stopped VM is made of a backup: `restore --from DIR [VM|BACKUP] [NAME]`; of a VM it is the
    newest. It is named as it was, unless NAME says otherwise.

    \b
    Examples:
      atoll restore web before-upgrade
      atoll restore --keep web before-upgrade
      atoll restore --from /mnt/backups web
      atoll restore --from /mnt/backups 20260131T02 web-of-january
    """
    if folder is not None:
        if keep or disk_only:
            raise click.UsageError("--keep and --disk-only don't go with --from: that makes a new VM")
        from atoll.cli.backup import restore_backup

        restore_backup(folder, vm, snapshot, quiet=quiet)
        return
    if vm is None or snapshot is None:
        raise click.UsageError(f"Missing argument '{'VM' if vm is None else 'SNAPSHOT'}'")
    name, kept = vm, snapshot
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        found = await host.get(name)
        with Shown(f"restoring {name}", quiet=quiet) as shown:
            await found.restore(kept, keep=keep, disk_only=disk_only, report=shown.report)

    perform(action)


@click.command("forget")
@click.argument("vm", type=VM)
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True, type=SNAPSHOT)
def forget_command(vm: str, snapshots: tuple[str, ...]) -> None:
    """Take snapshots out of a VM's history. What stands on them keeps its data; what nothing needs is removed.

    \b
    Example:
      atoll forget web before-upgrade
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        found = await host.get(vm)
        for snapshot in snapshots:
            await found.forget(snapshot)

    perform(action)


@click.command("clone")
@click.argument("source", metavar="VM|VM@SNAPSHOT", type=VM_OR_SNAPSHOT)
@click.argument("name", required=False)
@click.option("--full", is_flag=True, help="Copy the disks whole, so that it shares nothing.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def clone_command(source: str, name: str | None, full: bool, quiet: bool, format: Format) -> None:
    """Make a stopped VM with the disks of another, or of a snapshot; print its name.

    It takes a moment at any size, since both stand on the same frozen layers. A running VM is cloned as if its power
    had failed just now.

    \b
    Examples:
      atoll clone web web-2
      atoll clone web@before-upgrade trial
      atoll clone --full web copy
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "AsyncVm":
        with Shown(f"cloning {source}", quiet=quiet) as shown:
            return await host.clone(source, name, full=full, report=shown.report)

    made = perform(action)
    if format == "table":
        click.echo(made.name)
    else:
        emit({"id": made.id, "name": made.name}, format)
