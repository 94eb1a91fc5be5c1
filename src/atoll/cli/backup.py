"""`backup`, and `restore --from`: copies of VMs in a folder that needs nothing of this computer."""

from typing import TYPE_CHECKING, Any

import click

from atoll.cli.failures import Format, note
from atoll.cli.options import VM
from atoll.cli.output import age, emit, format_option, print_table
from atoll.model.units import format_size

if TYPE_CHECKING:
    from atoll.model.backup import Backup, Pruned, Verified
    from atoll.platform.api import AsyncHost


class _Backup(click.Group):
    """`backup web --to DIR` is `backup create web --to DIR`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        has_target = any(word == "--to" or word.startswith("--to=") for word in args)
        return super().parse_args(ctx, ["create", *args] if has_target and args[0] not in self.commands else args)


@click.group("backup", cls=_Backup)
def backup_command() -> None:
    """Back VMs up into a folder, check it, and let old backups go. `restore --from` makes VMs of them again.

    A folder has any number of VMs' backups, each complete by itself; what they have in common is there once.

    \b
    Examples:
      atoll backup create web --to /mnt/backups
      atoll backup ls --in /mnt/backups
      atoll restore --from /mnt/backups web
    """


@backup_command.command("create")
@click.argument("vm", type=VM)
@click.option("--to", "folder", metavar="DIR", required=True, help="The folder; made if it isn't there.")
@click.option("--quiesce", is_flag=True, help="Freeze the guest's file systems for the moment of the backup.")
@click.option("--message", "-m", default="", help="What it is of, for people.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def create(vm: str, folder: str, quiesce: bool, message: str, quiet: bool, format: Format) -> None:
    """Copy a VM's disks, as they are at this instant, into a folder; print the backup's id.

    The VM runs on. After the first time only what changed since is read and written. Without --quiesce a guest that
    runs finds its disks as after a power cut.

    \b
    Examples:
      atoll backup create web --to /mnt/backups
      atoll backup create db --to /mnt/backups --quiesce -m nightly
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "Backup":
        found = await host.get(vm)
        with Shown(f"backing up {vm}", quiet=quiet) as shown:
            return await found.backup(folder, message=message, quiesce=quiesce, report=shown.report)

    made = perform(action)
    if format == "table":
        click.echo(made.id)
    else:
        emit(made, format)


_IN = click.option("--in", "folder", metavar="DIR", required=True, help="The folder of backups.")


@backup_command.command("ls")
@_IN
@click.argument("vm", required=False)
@click.option("--quiet", "-q", is_flag=True, help="Only ids, one a line.")
@format_option
def ls(folder: str, vm: str | None, quiet: bool, format: Format) -> None:
    """List the backups in a folder, or those of one VM.

    SIZE is all that a backup needs, ADDED what the folder hadn't got before it.

    \b
    Examples:
      atoll backup ls --in /mnt/backups
      atoll backup ls --in /mnt/backups web --format json
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "tuple[list[Backup], list[str]]":
        return await host.backups.ls(folder, vm), await host.backups.unreadable(folder)

    found, unreadable = perform(action, cancelled="")
    for each in unreadable:
        note(f"a backup can't be read: {each}")
    if quiet:
        for backup in found:
            click.echo(backup.id)
    elif format != "table":
        emit(found, format)
    else:
        print_table(("BACKUP", "VM", "AGE", "SIZE", "ADDED", "MESSAGE"), [_row(each) for each in found])


def _row(backup: "Backup") -> tuple[str, ...]:
    size, added = format_size(backup.size), format_size(backup.added)
    return backup.id, backup.vm_name, age(backup.created_at), size, added, backup.message or "-"


@backup_command.command("verify")
@_IN
@click.argument("backup", metavar="[VM|BACKUP]", required=False)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def verify(folder: str, backup: str | None, quiet: bool, format: Format) -> int:
    """Read every file of a folder, or of one backup, and tell what is damaged. Ends with 1 if anything is.

    \b
    Examples:
      atoll backup verify --in /mnt/backups
      atoll backup verify --in /mnt/backups web
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> "Verified":
        with Shown(f"verifying {folder}", quiet=quiet) as shown:
            return await host.backups.verify(folder, backup, report=shown.report)

    found = perform(action, cancelled="")
    if format != "table":
        emit(found, format)
        return 1 if found.damages else 0
    for damage in found.damages:
        note(f"{damage.path}: {damage.why}. It is needed by {', '.join(damage.backups)}.")
    lost = len({backup for damage in found.damages for backup in damage.backups})
    click.echo(
        f"{found.backups - lost} of {found.backups} backups are whole ({found.files} files, {format_size(found.size)})."
    )
    return 1 if found.damages else 0


@backup_command.command("prune")
@_IN
@click.argument("vm")
@click.option("--keep-last", default=0, metavar="N", help="The last N.")
@click.option("--keep-hourly", default=0, metavar="N", help="The newest of each of the last N hours that have one.")
@click.option("--keep-daily", default=0, metavar="N", help="Of days.")
@click.option("--keep-weekly", default=0, metavar="N", help="Of weeks, which begin on Monday.")
@click.option("--keep-monthly", default=0, metavar="N", help="Of months.")
@click.option("--keep-yearly", default=0, metavar="N", help="Of years.")
@click.option("--dry-run", "-n", is_flag=True, help="Only tell what would be removed.")
@format_option
def prune(folder: str, vm: str, dry_run: bool, format: Format, **rules: Any) -> None:
    """Remove backups of a VM but those that one of the rules keeps, and the files that no backup needs any more.

    \b
    Examples:
      atoll backup prune --in /mnt/backups web --keep-last 3 --dry-run
      atoll backup prune --in /mnt/backups web --keep-daily 7 --keep-weekly 4 --keep-monthly 12
    """
    from atoll.cli.session import perform
    from atoll.model.backup import Keep

    keep = Keep(**{rule.removeprefix("keep_"): count for rule, count in rules.items()})

    async def action(host: "AsyncHost") -> "Pruned":
        return await host.backups.prune(folder, vm, keep, dry_run=dry_run)

    pruned = perform(action, cancelled="what was removed is gone; the other backups are whole")
    if format != "table":
        emit(pruned, format)
        return
    rows = [(kept.id, "keep", ", ".join(kept.reasons)) for kept in pruned.kept]
    rows += [(each, "remove", "-") for each in pruned.removed]
    print_table(("BACKUP", "ACTION", "RULES"), sorted(rows, reverse=True))
    click.echo(f"{'Would free' if dry_run else 'Freed'} {format_size(pruned.freed)} in {pruned.files} files.")


def restore_backup(folder: str, reference: str | None, name: str | None, *, quiet: bool) -> None:
    """`restore --from`."""
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> tuple[str, list[str]]:
        backup = await host.backups.show(folder, reference)
        with Shown(f"restoring {backup.vm_name}", quiet=quiet) as shown:
            made = await host.backups.restore(folder, backup.id, name, report=shown.report)
        there = set(await made.ports())
        return made.name, [str(port) for nic in backup.spec.nics for port in nic.ports if port not in there]

    made, dropped = perform(action)
    for port in dropped:
        note(f"{made} doesn't publish {port}: another VM has that port.")
    click.echo(made)
