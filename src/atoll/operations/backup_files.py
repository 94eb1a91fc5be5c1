"""The layers and plain files of a backup: which of them the folder has, and the way there."""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import ImageRefused, RecordsFailed, StorageFailed
from atoll.images import qcow2
from atoll.images.source import CopyFailed, digest, opened
from atoll.model.backup import BackupDisk, StoredLayer
from atoll.model.image import Layer
from atoll.model.names import SHORT_ID
from atoll.model.operation import Progress
from atoll.model.spec import DiskSpec
from atoll.operations.services import Report, Services
from atoll.qemu.plan import layer_chain
from atoll.store import backup_folder
from atoll.store.backup_folder import BackupFolder


class Vanished(Exception):
    """A layer's file has gone: it was merged into another one, and the chain has to be looked at again."""


class Total:
    """Adds up what is reported of one file after another."""

    def __init__(self, report: Report, total: int, step: str) -> None:
        self._report, self._total, self._step = report, total, step
        self._done = 0

    def part(self, progress: Progress) -> None:
        self._report(Progress(step=self._step, done=self._done + progress.done, total=self._total, unit="bytes"))

    def add(self, size: int) -> None:
        self._done += size


async def read(path: Path, *, total: Total, copy_to: Path | None = None) -> tuple[str, int]:
    """The SHA-256 and the size of a file, all of which is read; and on the way a sparse copy of it.

    Raises `StorageFailed`, `Vanished`.
    """
    if copy_to is not None:
        copy_to.unlink(missing_ok=True)
    try:
        with opened(path) as source:
            sha256 = await digest(source, report=total.part, copy_to=copy_to)
            total.add(source.size)
            return sha256, source.size
    except ImageRefused as error:
        raise StorageFailed(f"can't read {path}", error.why) from error
    except StorageFailed as error:
        if isinstance(error.__cause__, FileNotFoundError) and not path.exists():
            raise Vanished from error
        raise


def size_of_layer(path: Path) -> int:
    """Bytes of the disk in a layer's file. Raises `ImageRefused` when its header can't be a layer's, or has QEMU open
    other files; `StorageFailed`.
    """
    with opened(path) as source:
        return qcow2.virtual_size(source, layered=True)


def has_data(path: Path) -> bool:
    """Raises `ImageRefused`, `StorageFailed`, `Vanished`."""
    try:
        with opened(path) as source:
            qcow2.virtual_size(source, layered=True)
            return qcow2.has_data(source)
    except StorageFailed as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise Vanished from error
        raise


def expanded(layer_id: str, known: Mapping[str, Layer], have: Callable[[str], bool]) -> list[str] | None:
    """Layers that stand for this one and that are there: itself, or those that it was merged from; else None."""
    if have(layer_id):
        return [layer_id]
    merged = known[layer_id].merged if layer_id in known else ()
    parts = [expanded(part, known, have) for part in merged]
    found = [part for part in parts if part is not None]
    return [each for part in found for each in part] if merged and len(found) == len(parts) else None


class Stored(Struct):
    """A disk's chain as the folder will have it, and what has to be copied for that."""

    disk: BackupDisk
    missing: list[str]


LONGEST_STORED = 256
"""Layers of a stored chain after which merged ones are taken as they are: one more copy of what they have, and the
layers from before go with the backups that need them. QEMU opens as many at once when the chain is restored.
"""


def plan(disk: DiskSpec, services: Services, folder: BackupFolder, *, empty: Collection[str]) -> Stored:
    """How a disk is stored. `empty` are layers of which it is known that they have no data. Raises `Vanished`."""
    known = {layer.id: layer for layer in services.records.layers()}
    chain = layer_chain(disk.layer, known)
    stored = _plan(disk, chain, known, services, folder, empty)
    if len(stored.disk.chain) > LONGEST_STORED:
        whole = {layer: replace(known[layer], merged=()) for layer in chain}
        stored = _plan(disk, chain, whole, services, folder, empty)
    return stored


def _plan(
    disk: DiskSpec,
    layers: list[str],
    known: Mapping[str, Layer],
    services: Services,
    folder: BackupFolder,
    empty: Collection[str],
) -> Stored:
    def have(layer_id: str) -> bool:
        return layer_id in empty or backup_folder.stored_layer(folder, layer_id) is not None

    chain: list[str] = []
    without_data: list[str] = []
    missing: list[str] = []
    for layer_id in layers:
        parts = expanded(layer_id, known, have)
        if parts is not None:
            chain += [part for part in parts if part not in empty]
            without_data += [part for part in parts if part in empty]
        elif has_data(services.layout.layer(layer_id)):
            chain.append(layer_id)
            missing.append(layer_id)
        else:
            without_data.append(layer_id)
    stored = BackupDisk(name=disk.name, size=disk.size, chain=tuple(chain), empty=tuple(without_data))
    return Stored(stored, missing)


async def store_layer(services: Services, folder: BackupFolder, layer_id: str, *, total: Total, temporary: str) -> None:
    """Copy a layer into the folder. Raises `StorageFailed`, also when it isn't any more what it was; `Vanished`."""
    source, target = services.layout.layer(layer_id), folder.temporary / f"{temporary}-layer"
    layer = services.records.layer(layer_id)
    sha256, size = await _copy(folder, source, target, total=total)
    if layer is not None and layer.sha256 not in ("", sha256):
        target.unlink()
        raise StorageFailed(
            f"the layer {layer_id[:SHORT_ID]} is damaged",
            f"{source} had the SHA-256 {layer.sha256[:SHORT_ID]}… and has {sha256[:SHORT_ID]}… now",
            "Restore an earlier backup; the present content can't be trusted.",
        )
    stored = StoredLayer(id=layer_id, sha256=sha256, size=size, virtual_size=size_of_layer(target))
    with backup_folder.told(folder, f"write {folder.layer(layer_id)}"):
        backup_folder.put_layer_note(folder, stored, name=f"{temporary}-note")
        backup_folder.keep(target, folder.layer(layer_id))
    if layer is not None and not layer.sha256:
        note(services, layer_id, sha256)


async def agree(services: Services, folder: BackupFolder, layers: Iterable[str], report: Report) -> None:
    """Prove that what the folder has of these layers is what is here under their ids; one that nobody has read yet is
    read. Raises `StorageFailed`, `Vanished`.
    """
    for layer_id in layers:
        layer, stored = services.records.layer(layer_id), backup_folder.stored_layer(folder, layer_id)
        if layer is None or stored is None:
            continue
        sha256 = layer.sha256
        if not sha256:
            sha256, _ = await read(services.layout.layer(layer_id), total=Total(report, stored.size, "compare layers"))
            note(services, layer_id, sha256)
        if sha256 != stored.sha256:
            raise StorageFailed(
                f"{folder.path} has another layer {layer_id[:SHORT_ID]} than this computer",
                "it was altered here or there, or two computers write there, and one began as a copy of the other",
                f"Check it with `atoll backup verify --in {folder.path}`, or use another folder for this computer.",
            )


def note(services: Services, layer_id: str, sha256: str) -> None:
    """Whoever reads the layer next can tell whether it is still the same. Best effort."""
    try:
        services.records.note_sha256(layer_id, sha256)
    except RecordsFailed:
        return


async def store_blob(folder: BackupFolder, source: Path, sha256: str, *, total: Total, temporary: str) -> int:
    """Copy a plain file into the folder unless it is there; its size if it was copied, else 0."""
    size, target = source.stat().st_size, folder.blob(sha256)
    if target.exists() and target.stat().st_size == size:
        return 0
    unfinished = folder.temporary / f"{temporary}-blob"
    found, size = await _copy(folder, source, unfinished, total=total)
    if found != sha256:
        unfinished.unlink()
        raise StorageFailed(f"{source} is damaged", f"its SHA-256 is {found[:SHORT_ID]}…, not {sha256[:SHORT_ID]}…")
    with backup_folder.told(folder, f"write {target}"):
        backup_folder.keep(unfinished, target)
    return size


async def _copy(folder: BackupFolder, source: Path, target: Path, *, total: Total) -> tuple[str, int]:
    try:
        return await read(source, total=total, copy_to=target)
    except CopyFailed:
        with backup_folder.told(folder, f"write to {folder.path}"):
            raise
    raise AssertionError
