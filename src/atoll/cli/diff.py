"""`diff`: what has changed since a snapshot, or between two machines."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format, note, printable
from atoll.cli.options import VM_OR_SNAPSHOT
from atoll.cli.output import emit, format_option
from atoll.model.units import format_size

if TYPE_CHECKING:
    from atoll.model.difference import Difference, DiskDifference, FileDifference
    from atoll.platform.api import AsyncHost

MOST_FILES = 10_000
"""Files that are listed for people; JSON and YAML have all."""
_LETTERS = {"added": "A", "modified": "M", "removed": "D"}


@click.command("diff")
@click.argument("old", metavar="VM|VM@SNAPSHOT", type=VM_OR_SNAPSHOT)
@click.argument("new", metavar="VM|VM@SNAPSHOT", type=VM_OR_SNAPSHOT)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def diff_command(old: str, new: str, quiet: bool, format: Format) -> None:
    """Tell what the second VM or snapshot has otherwise than the first: settings, and files on its disks.

    A is a file that was added, M one that was modified, D one that was removed. Files of ext2, ext3 and ext4 are
    compared by type, mode, owner, size, times, and where only times differ by content; of anything else on a disk is
    told how much of it differs. The disks are read as they are: of a VM that runs, without what it still has to write.

    \b
    Examples:
      atoll diff web@before-upgrade web
      atoll diff web@monday web@tuesday --format json
      atoll diff try-1 try-2
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "Difference":
        with Shown(f"comparing {old} and {new}", quiet=quiet) as shown:
            return await host.diff(old, new, report=shown.report)

    found = perform(action, cancelled="")
    if format != "table":
        emit(found, format)
        return
    for told in found.notes:
        note(told)
    click.echo("\n".join(lines(found)))


def lines(found: "Difference", *, most: int = MOST_FILES) -> Iterator[str]:
    """The difference for people, with `most` files of each disk."""
    if found.nothing:
        yield "nothing differs"
    if found.settings:
        yield "settings"
        for each in found.settings:
            yield printable(f"  {each.name}: {each.old or '-'} -> {each.new or '-'}")
    for disk in found.disks:
        yield from _of_disk(disk, most)


def _of_disk(disk: "DiskDifference", most: int) -> Iterator[str]:
    for system in disk.file_systems:
        where = f", partition {system.partition}" if system.partition else ""
        yield f"disk {disk.name}{where} ({system.kind})"
        for file in system.files[:most]:
            yield f"  {_LETTERS[file.change]} {_path(file)}{_told(file)}"
        if len(system.files) > most:
            yield f"  … and {len(system.files) - most} more files; --format json has them all"
    if disk.blocks is not None:
        count = f"{disk.blocks.ranges} range{'s' if disk.blocks.ranges > 1 else ''}"
        yield f"disk {disk.name}: {format_size(disk.blocks.bytes)} in {count} differ ({printable(disk.blocks.why)})"


def _path(file: "FileDifference") -> str:
    # A line each, whatever a guest calls its files.
    return printable(file.path).replace("\n", "\\n") + ("/" if file.kind == "folder" else "")


def _told(file: "FileDifference") -> str:
    """Its size, or both, and what of it differs where that isn't seen from them."""
    old, new = (None if size is None else format_size(size) for size in (file.old_size, file.new_size))
    sizes = new if old is None else old if new is None else f"{old} -> {new}" if "size" in file.aspects else new
    words = [sizes] if sizes else []
    if file.aspects:
        words.append(", ".join(file.aspects))
    return "".join(f"  {word}" for word in words)
