"""backup verify: reads every file of a folder, and tells what is damaged and which backups need it."""

from collections.abc import Callable
from pathlib import Path

from atoll.errors import ImageRefused, StorageFailed
from atoll.model.backup import Backup, Damage, StoredLayer, Verified
from atoll.model.names import SHORT_ID
from atoll.operations import backup_files, backup_find
from atoll.operations.backup_files import Total, Vanished
from atoll.operations.services import Report
from atoll.store import backup_folder, backup_manifests
from atoll.store.backup_folder import BackupFolder

COPY_AGAIN = "if the VM still has it, remove this file and make a backup: that copies it again"


async def verify(path: str | Path, reference: str | None = None, *, report: Report | None = None) -> Verified:
    """Check all backups of the folder, or one (of a VM, the newest). Raises `NotFound`, `StorageFailed`."""
    folder = backup_folder.opened(path)
    unreadable: list[backup_manifests.Unreadable] = []
    if reference is None:
        backups, unreadable = backup_manifests.manifests(folder)
    else:
        backups = [backup_find.find(path, reference)]
    damages = [Damage(path=str(each.path), why=each.why, backups=(each.id,)) for each in unreadable]
    layers = {layer.id: layer for backup in backups for layer in backup.layers}
    blobs = {blob.sha256: blob.size for backup in backups for blob in backup.blobs}
    size = sum(layer.size for layer in layers.values()) + sum(blobs.values())
    total = Total(report or (lambda progress: None), size, "read")
    for layer in layers.values():
        damages += await _layer(folder, layer, backups, total)
    for sha256 in blobs:
        damages += await _blob(folder, sha256, backups, total)
    found = len(backups) + len(unreadable)
    return Verified(backups=found, files=len(layers) + len(blobs), size=size, damages=tuple(damages))


async def _layer(folder: BackupFolder, layer: StoredLayer, backups: list[Backup], total: Total) -> list[Damage]:
    path = folder.layer(layer.id)
    found, why = await _sha256(path, total)

    def differs(backup: Backup) -> bool:
        # Each has its own word about it, and is lost when that isn't true.
        return any(each.id == layer.id and each.sha256 != found for each in backup.layers)

    if not why and any(differs(backup) for backup in backups):
        why = _changed(found)
    if why:
        return _damage(folder, path, why, backups, differs)
    why = _header(path, layer)
    return _damage(folder, path, why, backups, lambda backup: any(each.id == layer.id for each in backup.layers))


def _header(path: Path, layer: StoredLayer) -> str:
    try:
        size = backup_files.size_of_layer(path)
    except (ImageRefused, StorageFailed) as error:
        return error.why
    return "" if size == layer.virtual_size else f"its disk has {size} bytes, not {layer.virtual_size}"


async def _blob(folder: BackupFolder, sha256: str, backups: list[Backup], total: Total) -> list[Damage]:
    path = folder.blob(sha256)
    found, why = await _sha256(path, total)
    if not why and found != sha256:
        why = _changed(found)
    return _damage(folder, path, why, backups, lambda backup: any(blob.sha256 == sha256 for blob in backup.blobs))


def _changed(sha256: str) -> str:
    return f"its content has changed, its SHA-256 is {sha256[:SHORT_ID]}…; {COPY_AGAIN}"


async def _sha256(path: Path, total: Total) -> tuple[str, str]:
    """The file's SHA-256, or why there is none."""
    try:
        sha256, _ = await backup_files.read(path, total=total)
    except Vanished:
        return "", f"it is missing; {COPY_AGAIN.replace('remove this file and ', '')}"
    except StorageFailed as error:
        return "", error.why
    return sha256, ""


def _damage(
    folder: BackupFolder, path: Path, why: str, backups: list[Backup], needs: Callable[[Backup], bool]
) -> list[Damage]:
    """Nothing when all backups that need the file were pruned meanwhile."""
    affected = tuple(backup.id for backup in backups if needs(backup) and folder.manifest(backup).exists())
    return [Damage(path=str(path), why=why, backups=affected)] if why and affected else []
