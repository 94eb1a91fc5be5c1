"""Which backups of a folder a user means."""

from collections.abc import Sequence
from pathlib import Path

from atoll.errors import InvalidInput, NotFound, StorageFailed
from atoll.model.backup import Backup
from atoll.model.names import shown
from atoll.store import backup_folder, backup_manifests
from atoll.store.backup_folder import BackupFolder
from atoll.store.backup_manifests import Unreadable

_TIME = len("20260131T235959Z")


def listed(path: str | Path, vm: str | None = None) -> list[Backup]:
    """The backups of a folder that can be read, or of one VM in it, oldest first. Raises `NotFound`."""
    folder = backup_folder.opened(path)
    found, unreadable = backup_manifests.manifests(folder)
    return found if vm is None else of_vm(folder, vm, found, unreadable)


def unreadable(path: str | Path) -> list[str]:
    """A sentence about each manifest that can't be read."""
    _, found = backup_manifests.manifests(backup_folder.opened(path))
    return [f"{each.path}: {each.why}" for each in found]


def of_vm(
    folder: BackupFolder, reference: str, backups: Sequence[Backup], unreadable: Sequence[Unreadable] = ()
) -> list[Backup]:
    """The backups of the VM that has, or had, that name or id. Raises `NotFound`."""
    ids = {backup.vm_id for backup in backups if reference in (backup.vm_name, backup.vm_id)}
    if not ids:
        ids = {backup.vm_id for backup in backups if reference and backup.vm_id.startswith(reference)}
    if not ids or (len(ids) > 1 and not any(reference == backup.vm_name for backup in backups)):
        raise _unknown(folder, reference, "VM", unreadable)
    return [backup for backup in backups if backup.vm_id in ids]


def find(path: str | Path, reference: str | None = None) -> Backup:
    """A backup by its id or the beginning of that; of a VM's name or id, the newest. None means the only VM's newest.

    Raises `NotFound`, `InvalidInput` (fits several), `StorageFailed` when a newer one of that VM can't be read.
    """
    folder = backup_folder.opened(path)
    backups, damaged = backup_manifests.manifests(folder)
    if reference is None:
        return _newest(folder, _only_vm(folder, backups, damaged), damaged)
    exact = [backup for backup in backups if backup.id == reference]
    fitting = exact or [backup for backup in backups if reference and backup.id.startswith(reference)]
    named = any(reference in (backup.vm_name, backup.vm_id) for backup in backups)
    if fitting and not named:
        if len(fitting) > 1:
            some = ", ".join(backup.id for backup in fitting[:5])
            raise InvalidInput(f"'{reference}' fits {len(fitting)} backups", some, "Write more of the id.")
        return fitting[0]
    for each in damaged:
        if reference == each.id:
            raise StorageFailed(f"the backup {each.id} can't be read", f"{each.path}: {each.why}")
    return _newest(folder, of_vm(folder, reference, backups, damaged), damaged)


def _only_vm(folder: BackupFolder, backups: list[Backup], damaged: Sequence[Unreadable]) -> list[Backup]:
    names = sorted({backup.vm_name for backup in backups})
    if len({backup.vm_id for backup in backups}) > 1:
        raise InvalidInput(f"{folder.path} has backups of several VMs", ", ".join(names[:8]), "Name one of them.")
    if not backups:
        raise _unknown(folder, None, "VM", damaged)
    return backups


def _newest(folder: BackupFolder, backups: Sequence[Backup], damaged: Sequence[Unreadable]) -> Backup:
    newest = max(backups, key=lambda backup: (backup.created_at, backup.id))
    for each in damaged:
        # Ids begin with their time, to the second. An older one than was meant would be a bad surprise.
        if each.vm_id == newest.vm_id and each.id[:_TIME] >= newest.id[:_TIME]:
            raise StorageFailed(
                f"the newest backup of {newest.vm_name} can't be read",
                f"{each.path}: {each.why}",
                f"Name the one before it, {newest.id}, to have that.",
            )
    return newest


def _unknown(folder: BackupFolder, reference: str | None, kind: str, damaged: Sequence[Unreadable]) -> NotFound:
    what = "there is no backup" if reference is None else f"there is no backup of {shown(reference)}"
    why = f"{len(damaged)} of its manifests can't be read, such as {damaged[0].path}" if damaged else ""
    return NotFound(f"{what} in {folder.path}", why, f"`atoll backup ls --in {folder.path}` lists what there is.")
