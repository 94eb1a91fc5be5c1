"""The manifests in a folder of backups: each has a checksum over itself, and is proved before it is believed."""

import contextlib
import hashlib
from pathlib import Path

import msgspec

from atoll.host import files
from atoll.model.backup import Backup, flaw
from atoll.store.backup_folder import BackupFolder, put, sync, told


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """A manifest's file: the record, and a SHA-256 over its bytes."""

    sha256: str
    backup: msgspec.Raw


class Unreadable(msgspec.Struct, frozen=True):
    """A manifest that is damaged, or newer than this Atoll."""

    path: Path
    why: str

    @property
    def vm_id(self) -> str:
        return self.path.parent.name

    @property
    def id(self) -> str:
        return self.path.stem


def put_manifest(folder: BackupFolder, backup: Backup) -> None:
    """With this the backup exists. Raises `OSError`."""
    files.make_folder(folder.manifest(backup).parent)
    sync(folder.manifests)
    body = msgspec.json.encode(backup)
    sha256 = hashlib.sha256(body).hexdigest()
    content = b'{"sha256":"' + sha256.encode() + b'","backup":' + body + b"}\n"
    put(folder, folder.manifest(backup), content, name=f"{backup.id}-manifest")


def read_manifest(path: Path) -> Backup | Unreadable:
    """Raises `FileNotFoundError` when it was removed, `OSError`."""
    content = path.read_bytes()
    try:
        envelope = msgspec.json.decode(content, type=_Envelope)
    except ValueError as error:
        return Unreadable(path, f"it is damaged: {error}")
    if hashlib.sha256(bytes(envelope.backup)).hexdigest() != envelope.sha256:
        return Unreadable(path, "it is damaged: its content doesn't have its checksum")
    try:
        backup = msgspec.json.decode(envelope.backup, type=Backup)
    except ValueError as error:
        return Unreadable(path, f"it is of a newer Atoll: {error}")
    if (backup.vm_id, backup.id) != (path.parent.name, path.stem):
        return Unreadable(path, "it is another backup's: it lies under a wrong name")
    if why := flaw(backup):
        return Unreadable(path, f"it can't be: {why}")
    return backup


def manifests(folder: BackupFolder, vm_id: str = "*") -> tuple[list[Backup], list[Unreadable]]:
    """All, or those of a VM, oldest first. Raises `StorageFailed`."""
    read: list[Backup] = []
    unreadable: list[Unreadable] = []
    with told(folder, f"read {folder.manifests}"):
        for path in sorted(folder.manifests.glob(f"{vm_id}/*.json")):
            with contextlib.suppress(FileNotFoundError):
                found = read_manifest(path)
                unreadable.append(found) if isinstance(found, Unreadable) else read.append(found)
    return sorted(read, key=lambda backup: (backup.created_at, backup.id)), unreadable
