"""A folder of backups: what is where in it, and how it is written so that it is valid at every instant.

    atoll-backup.json               what this folder is
    .atoll-backup.lock              held (flock) by who writes; readers need no lock
    layers/ID.qcow2, ID.json        a layer, and before it is there its size and SHA-256
    blobs/SHA256                    a plain file
    backups/VM-ID/BACKUP-ID.json    a manifest, written when all that it names is there
    tmp/                            unfinished files

It may be on any file system: nothing is linked, modes are for people.
"""

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from atoll.errors import AtollError, InvalidInput, NotFound, StorageFailed, Unsupported, from_os_error
from atoll.host import files
from atoll.host.lease import lease
from atoll.model.backup import FORMAT, MAGIC, Backup, Marker, StoredLayer

MARKER = "atoll-backup.json"
WAIT_FOR_WRITER = 3600.0
"""Seconds that a writer waits for another one: a first backup of large disks takes long."""
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENOSYS)
"""How file systems refuse what they don't have: modes, fsync of folders."""


@dataclass(frozen=True)
class BackupFolder:
    """Where things are in it."""

    path: Path

    @property
    def marker(self) -> Path:
        return self.path / MARKER

    @property
    def lock(self) -> Path:
        return self.path / ".atoll-backup.lock"

    @property
    def layers(self) -> Path:
        return self.path / "layers"

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def manifests(self) -> Path:
        return self.path / "backups"

    @property
    def temporary(self) -> Path:
        return self.path / "tmp"

    def layer(self, layer_id: str) -> Path:
        return self.layers / f"{layer_id}.qcow2"

    def layer_note(self, layer_id: str) -> Path:
        """The layer's size and SHA-256. It is there before the layer is, so whoever finds that knows them."""
        return self.layers / f"{layer_id}.json"

    def blob(self, sha256: str) -> Path:
        return self.blobs / sha256

    def manifest(self, backup: Backup) -> Path:
        return self.manifests / backup.vm_id / f"{backup.id}.json"


# Opening


def located(path: str | Path) -> BackupFolder:
    """The folder that a user named. Raises `InvalidInput`."""
    if not str(path):
        raise InvalidInput("there is no folder for backups", next_step="Name one.")
    try:
        return BackupFolder(Path(path).expanduser().absolute())
    except (RuntimeError, ValueError) as error:
        raise InvalidInput(f"{str(path)!r} is no folder", str(error), "Write its whole path.") from error


def opened(path: str | Path) -> BackupFolder:
    """A folder that has backups. Raises `NotFound`, `InvalidInput`, `Unsupported` (newer), `StorageFailed`."""
    folder = located(path)
    with told(folder, f"read {folder.path}"):
        if not folder.path.is_dir():
            raise NotFound(f"there is no folder {folder.path}", next_step="Is the disk mounted that it is on?")
        if not folder.marker.exists():
            raise InvalidInput(
                f"{folder.path} has no backups of Atoll's",
                f"there is no {MARKER} in it",
                "Name the folder that `atoll backup create --to` was given.",
            )
        _check_marker(folder)
    return folder


def made(path: str | Path) -> BackupFolder:
    """A folder to write to, made if it isn't there. Raises as `opened`, and `InvalidInput` when it has other things."""
    folder = located(path)
    with told(folder, f"write to {folder.path}"):
        if folder.path.exists() and not folder.path.is_dir():
            raise InvalidInput(f"{folder.path} is no folder", next_step="Name another with --to.")
        if folder.marker.exists():
            _check_marker(folder)
        else:
            _check_empty(folder)
        files.make_folder(folder.path)
        for each in (folder.layers, folder.blobs, folder.manifests, folder.temporary):
            files.make_folder(each)
    return folder


def _check_marker(folder: BackupFolder) -> None:
    try:
        marker = msgspec.json.decode(folder.marker.read_bytes(), type=Marker)
        if marker.magic != MAGIC:
            raise ValueError(f"its magic is {marker.magic!r}")
    except ValueError as error:
        raise StorageFailed(
            f"{folder.path} can't be used for backups",
            f"{MARKER} is damaged: {error}",
            f'If the folder is one, write {{"magic":"{MAGIC}","format":{FORMAT}}} into that file.',
        ) from error
    if marker.format > FORMAT:
        raise Unsupported(
            f"{folder.path} is of a newer Atoll",
            f"its format is {marker.format}, and this Atoll knows those up to {FORMAT}",
            "Upgrade Atoll here, or use another folder.",
        )


def _check_empty(folder: BackupFolder) -> None:
    """Only what an interrupted first backup leaves, and what a file system of its own has, may be there."""
    ours = {"lost+found", folder.lock.name, "layers", "blobs", "backups", "tmp"}
    others = [entry.name for entry in folder.path.iterdir()] if folder.path.is_dir() else []
    strange = sorted(set(others) - ours)
    begun = [each for each in ("layers", "blobs", "backups") if any((folder.path / each).glob("*"))]
    # Another process may have made it one meanwhile.
    if (strange or begun) and not folder.marker.exists():
        raise InvalidInput(
            f"{folder.path} has other things in it",
            f"there is {(strange or begun)[0]!r}, and no {MARKER}",
            "Name an empty folder, or a new one.",
        )


@contextlib.asynccontextmanager
async def writing(folder: BackupFolder) -> AsyncIterator[None]:
    """Be the only one who writes there, on a folder without leftovers. Raises `Busy`, `StorageFailed`."""
    async with contextlib.AsyncExitStack() as stack:
        with told(folder, f"lock {folder.path}"):
            held = lease(folder.lock, what=f"the folder {folder.path}", timeout=WAIT_FOR_WRITER)
            await stack.enter_async_context(held)
            for left in list(folder.temporary.iterdir()) if folder.temporary.is_dir() else []:
                left.unlink(missing_ok=True)
            if not folder.marker.exists():
                marker = msgspec.json.format(msgspec.json.encode(Marker(magic=MAGIC, format=FORMAT)))
                put(folder, folder.marker, marker + b"\n", name="marker")
        yield


@contextlib.contextmanager
def told(folder: BackupFolder, doing: str) -> Iterator[None]:
    """Tell what the system refuses as about this folder: its way out isn't that of Atoll's home."""
    try:
        yield
    except OSError as error:
        raise _about(folder, error, doing) from error
    except StorageFailed as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise _about(folder, cause, doing) from cause


def _about(folder: BackupFolder, error: OSError, doing: str) -> AtollError:
    next_step = {
        errno.ENOSPC: f"Free some space there, such as by `atoll backup prune --in {folder.path}`; then try again.",
        errno.EDQUOT: "The quota there is used up: free some space, then try again.",
        errno.EROFS: "That file system is read-only: use another folder.",
        errno.EACCES: "Check the owner and the mode of that folder, or use another.",
        errno.EPERM: "Check the owner and the mode of that folder, or use another.",
        errno.ENOTDIR: "Something in its path is no folder: use another.",
        errno.ENOLCK: "That file system has no locks: mount it with them, or use another folder.",
        errno.EFBIG: "That file system takes no files of this size: use another.",
    }.get(error.errno or 0, "")
    plain = from_os_error(error, doing)
    return StorageFailed(plain.what, plain.why, next_step)


# Writing


def put(folder: BackupFolder, path: Path, content: bytes, *, name: str) -> None:
    """Write a small file: after a crash all of it is there, or nothing."""
    temporary = folder.temporary / name
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    keep(temporary, path)


def keep(temporary: Path, final: Path) -> None:
    """Make a finished file durable and known by its last name. Raises `OSError`."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    with _if_it_can():
        temporary.chmod(0o444)
    temporary.replace(final)
    sync(final.parent)


def sync(folder: Path) -> None:
    with _if_it_can():
        files.sync_folder(folder)


@contextlib.contextmanager
def _if_it_can() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def put_layer_note(folder: BackupFolder, layer: StoredLayer, *, name: str) -> None:
    put(folder, folder.layer_note(layer.id), msgspec.json.encode(layer), name=name)


def stored_layer(folder: BackupFolder, layer_id: str) -> StoredLayer | None:
    """What the folder knows of a layer; None when it hasn't got it, or not as it was written."""
    try:
        layer = msgspec.json.decode(folder.layer_note(layer_id).read_bytes(), type=StoredLayer)
        return layer if folder.layer(layer_id).stat().st_size == layer.size and layer.id == layer_id else None
    except (FileNotFoundError, ValueError):
        return None
