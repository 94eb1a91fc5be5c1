"""backup prune: old backups go by a policy, then the files that none of the others needs."""

from collections.abc import Iterable
from pathlib import Path

from atoll.errors import StorageFailed
from atoll.model import retention
from atoll.model.backup import Backup, Keep, KeptBackup, Pruned
from atoll.operations import backup_find
from atoll.operations.services import Services
from atoll.store import backup_folder, backup_manifests
from atoll.store.backup_folder import BackupFolder


async def prune(path: str | Path, vm: str, keep: Keep, *, services: Services, dry_run: bool = False) -> Pruned:
    """Remove what the policy doesn't keep of one VM's backups. Raises `InvalidInput` when it keeps nothing, `NotFound`,
    `StorageFailed`.

    Manifests go first: whatever breaks it off, each backup that is there is whole.
    """
    retention.check(keep)
    folder = backup_folder.opened(path)
    if dry_run:
        return _prune(folder, vm, keep, dry_run=True)
    async with backup_folder.writing(folder):
        with backup_folder.told(folder, f"remove files in {folder.path}"):
            pruned = _prune(folder, vm, keep, dry_run=False)
    if pruned.removed:
        data = {"folder": str(folder.path), "backups": list(pruned.removed)}
        services.records.add_event("backup.pruned", name=vm, data=data)
    return pruned


def _prune(folder: BackupFolder, vm: str, keep: Keep, *, dry_run: bool) -> Pruned:
    backups, unreadable = backup_manifests.manifests(folder)
    if unreadable:
        raise StorageFailed(
            f"{folder.path} can't be pruned",
            f"nobody knows what a manifest needs that can't be read: {unreadable[0].path}: {unreadable[0].why}",
            "If that backup is lost, remove its manifest; then try again.",
        )
    own = backup_find.of_vm(folder, vm, backups)
    kept = retention.kept({backup.id: backup.created_at for backup in own}, keep)
    removed = [backup for backup in own if backup.id not in kept]
    gone = {backup.id for backup in removed}
    unneeded = _unneeded(folder, [backup for backup in backups if backup.id not in gone])
    freed = sum(_size(each) for each in unneeded)
    if not dry_run:
        for backup in removed:
            folder.manifest(backup).unlink(missing_ok=True)
        for each in {folder.manifest(backup).parent for backup in removed}:
            backup_folder.sync(each)
            if not any(each.iterdir()):
                each.rmdir()
        for each in unneeded:
            each.unlink(missing_ok=True)
    return Pruned(
        removed=tuple(backup.id for backup in removed),
        kept=tuple(KeptBackup(id=each, reasons=why) for each, why in kept.items()),
        files=len([each for each in unneeded if each.suffix != ".json"]),
        freed=freed,
    )


def _unneeded(folder: BackupFolder, kept: Iterable[Backup]) -> list[Path]:
    """Layers before what is noted of them: a layer without its note would be copied again, a note alone is nothing."""
    kept = list(kept)
    layers = {layer.id for backup in kept for layer in backup.layers}
    blobs = {blob.sha256 for backup in kept for blob in backup.blobs}
    found = [each for each in sorted(folder.layers.iterdir(), reverse=True) if each.stem not in layers]
    return found + [each for each in sorted(folder.blobs.iterdir()) if each.name not in blobs]


def _size(path: Path) -> int:
    return path.stat().st_blocks * 512
