"""`fsck` and `prune`: is all there and whole, and what can go."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

import atoll
from atoll.cli.failures import Format, printable, settings
from atoll.cli.output import emit, format_option
from atoll.model.units import format_size

if TYPE_CHECKING:
    from atoll.model.finding import Finding
    from atoll.platform.api import AsyncHost

_SIGNS = {"error": "ERROR", "warning": "warn", "note": "note"}
_MOST = 8
"""Names that are told of those whom something concerns; JSON has all."""


@click.command("prune")
@click.option("--all", "-a", "every", is_flag=True, help="Also images that nothing came from, and whole downloads.")
@click.option("--dry-run", "-n", is_flag=True, help="Only tell what would be removed.")
@format_option
def prune_command(every: bool, dry_run: bool, format: Format) -> None:
    """Remove what nothing needs: layers, files, memory, unfinished folders; and tell the bytes of each.

    No VM, snapshot or image loses anything. What can be made again, such as the memory that forks begin with, goes too.

    \b
    Examples:
      atoll prune --dry-run
      atoll prune --all
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[tuple[str, int]]:
        return await host.prune(every=every, dry_run=dry_run)

    print_freed(perform(action), format, dry_run=dry_run)


def print_freed(removed: Sequence[tuple[str, int]], format: Format, *, dry_run: bool) -> None:
    """Each thing with its bytes, and the total."""
    if format != "table":
        emit([{"name": name, "bytes": size} for name, size in removed], format)
        return
    for name, size in removed:
        click.echo(f"{printable(name)}  {format_size(size)}")
    total = format_size(sum(size for _, size in removed))
    click.echo(f"{'Would free' if dry_run else 'Freed'} {total}.")


@click.command("fsck")
@click.option("--repair", is_flag=True, help="Mend what can be mended without loss.")
@click.option("--quick", is_flag=True, help="Don't read what is in layers and disks: seconds instead of minutes.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def fsck_command(repair: bool, quick: bool, quiet: bool, format: Format) -> int:
    """Check every layer, reference and record: what is wrong, whom it concerns, and what can be done.

    VMs may run meanwhile; their disks are read when they are stopped. A frozen layer is never written. Ends with 1 if
    errors remain.

    \b
    Examples:
      atoll fsck --quick
      atoll fsck --repair
    """
    findings = asyncio.run(_look(repair=repair, quick=quick, quiet=quiet))
    code = int(any(finding.remains for finding in findings))
    if format != "table":
        emit(findings, format)
        return code
    for finding in findings:
        _tell(finding)
    click.echo(_summary(findings))
    return code


async def _look(*, repair: bool, quick: bool, quiet: bool) -> "list[Finding]":
    from atoll.cli.failures import note
    from atoll.cli.progress import Shown
    from atoll.cli.session import interruptible
    from atoll.errors import RecordsFailed
    from atoll.platform.local import connect_local

    elsewhere = settings().host
    host: AsyncHost = connect_local() if elsewhere is None else atoll.connect_async(elsewhere)
    with interruptible(""):
        try:
            # Opening it settles what killed commands have left. Damaged records are something to tell, not to fail by.
            with contextlib.suppress(RecordsFailed):
                await host.__aenter__()
            for told in host.notices():
                note(told)
            with Shown("checking", quiet=quiet) as shown:
                return await host.fsck(repair=repair, quick=quick, report=shown.report)
        finally:
            await host.__aexit__(None, None, None)


def _tell(finding: "Finding") -> None:
    sign = "ok" if finding.repaired else _SIGNS[finding.severity]
    click.echo(f"{sign:6}{printable(finding.thing)}: {printable(finding.detail)}")
    lines = [
        f"Needed by: {_some(finding.affected)}" if finding.affected else "",
        f"Mended: {finding.repair}." if finding.repaired else "",
        f"`--repair` can: {finding.repair}." if finding.repair and not finding.repaired else "",
        finding.next_step if not finding.repaired else "",
    ]
    for line in lines:
        if line:
            click.echo(f"{'':6}{printable(line)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"{', '.join(names[:_MOST])}{more}"


def _summary(findings: "Sequence[Finding]") -> str:
    if not findings:
        return "Nothing is wrong."
    counts = Counter("mended" if finding.repaired else finding.severity for finding in findings)
    plural = {"error": "errors", "warning": "warnings", "note": "notes"}
    told = [
        f"{counts[each]} {each if counts[each] == 1 else plural.get(each, each)}"
        for each in ("error", "warning", "note", "mended")
        if counts[each]
    ]
    return f"{', '.join(told)}."
