"""backup

    step      do                                                                undo
    cut       the disks become layers at one instant, under new heads (`cut`)   remove the copy of the UEFI variables
    copy      each layer and plain file that the folder hasn't got              remove unfinished files there
    record    the manifest: with it the backup exists                           remove it

The VM's lock is held for the cut only. The layers stay until the operation ends, as its request names them (`copies`);
they never change, so the copying needs nothing of the VM. One writer at a time has the folder's own lock.
"""

import contextlib
import secrets
import time
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AtollError, DisksChanged, StorageFailed, Unsupported
from atoll.model.backup import Backup, BackupDisk, StoredBlob, StoredLayer, blobs_of
from atoll.model.spec import DiskSpec
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import backup_files, capture, heads, observe
from atoll.operations.backup_files import Total, Vanished
from atoll.operations.clone import CUT, CutRequest
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.resolve_disks import without_heads
from atoll.operations.services import Report, Services
from atoll.store import backup_folder, backup_manifests
from atoll.store.backup_folder import BackupFolder

ATTEMPTS = 5
"""How often a chain is looked at again because it was merged while it was copied, or disks changed before the cut."""


class BackupRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    to: str
    vm: Vm
    """As it is at the cut: its disks stand on the layers that are made by that."""
    heads: dict[str, str]
    copies: dict[str, str]
    """The layers that the cut makes of the present heads, by the disk's name; held until the end."""
    message: str = ""
    quiesce: bool = False


async def backup(
    vm: Vm,
    to: str | Path,
    *,
    services: Services,
    message: str = "",
    quiesce: bool = False,
    report: Report | None = None,
) -> Backup:
    """Back a VM up, whatever it does. Raises `InvalidInput` (the folder), `StorageFailed`, `WrongState`, `Busy`."""
    if quiesce and not vm.spec.guest.agent:
        raise Unsupported(f"{vm.name}: its file systems can't be frozen", "it has no guest agent", "Leave it away.")
    folder = backup_folder.made(to)
    async with backup_folder.writing(folder):
        for attempt in range(ATTEMPTS):
            request = _request(services, services.vm(vm.id), folder, message=message, quiesce=quiesce)
            try:
                await perform(
                    BACKUP, request, services=services, subject=request.id, subject_name=vm.name, report=report
                )
                break
            except DisksChanged:
                if attempt == ATTEMPTS - 1:
                    raise
            finally:
                services.layout.vm_lock(request.id).unlink(missing_ok=True)
        with backup_folder.told(folder, f"read {folder.path}"):
            made = backup_manifests.read_manifest(_manifest(folder, request))
    if not isinstance(made, Backup):
        raise StorageFailed(f"{vm.name}: the backup was damaged as it was written", made.why, f"Check {folder.path}.")
    return made


def _request(services: Services, vm: Vm, folder: BackupFolder, *, message: str, quiesce: bool) -> BackupRequest:
    stopped = observe.phase_of(services, vm) is Phase.STOPPED
    spec = vm.pending or vm.spec if stopped else vm.spec
    fresh = capture.new_heads(services, vm)
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return BackupRequest(
        id=f"{at}-{secrets.token_hex(2)}",
        to=str(folder.path),
        vm=replace(vm, spec=heads.split_spec(spec, fresh), pending=None),
        heads=fresh,
        copies={disk.name: disk.head for disk in spec.disks if disk.head},
        message=message,
        quiesce=quiesce,
    )


def _folder(context: Context[BackupRequest]) -> BackupFolder:
    return BackupFolder(Path(context.request.to))


def _manifest(folder: BackupFolder, request: BackupRequest) -> Path:
    return folder.manifests / request.vm.id / f"{request.id}.json"


def _variables(context: Context[BackupRequest]) -> Path:
    return context.services.layout.temporary / f"nvram-{context.request.id}"


async def _cut(context: Context[BackupRequest]) -> None:
    request, vm = context.request, context.request.vm
    wanted = CutRequest(
        vm_id=vm.id,
        heads=request.heads,
        expected=request.copies,
        nvram=_variables(context).name,
        quiesce=request.quiesce,
    )
    done = await perform(
        CUT, wanted, services=context.services, subject=vm.id, subject_name=vm.name, report=context.report
    )
    context.notes["at"] = done.notes["at"]
    context.notes["nvram"] = done.notes.get("nvram")
    context.notes["quiesced"] = request.quiesce and done.notes["phase"] == Phase.RUNNING


async def _remove_variables(context: Context[BackupRequest]) -> None:
    _variables(context).unlink(missing_ok=True)


def _written(vm: Vm) -> list[DiskSpec]:
    return [disk for disk in vm.spec.disks if disk.blob is None]


async def _copy(context: Context[BackupRequest]) -> None:
    services, folder, request = context.services, _folder(context), context.request
    earlier, _ = backup_manifests.manifests(folder, vm_id=request.vm.id)
    empty = {layer for backup in earlier for disk in backup.disks for layer in disk.empty}
    added = 0
    for attempt in range(ATTEMPTS):
        try:
            stored = [backup_files.plan(disk, services, folder, empty=empty) for disk in _written(request.vm)]
            missing = list(dict.fromkeys(layer for each in stored for layer in each.missing))
            there = dict.fromkeys(layer for each in stored for layer in each.disk.chain if layer not in missing)
            await backup_files.agree(services, folder, there, context.report)
            sizes = {layer: services.layout.layer(layer).stat().st_size for layer in missing}
            total = Total(context.report, sum(sizes.values()), "copy layers")
            for layer in missing:
                await backup_files.store_layer(services, folder, layer, total=total, temporary=request.id)
                added += sizes[layer]
            break
        except (Vanished, FileNotFoundError):
            if attempt == ATTEMPTS - 1:
                raise StorageFailed(
                    f"{request.vm.name}: a layer is gone while it is copied", next_step="Try again."
                ) from None
    context.notes["disks"] = msgspec.to_builtins([each.disk for each in stored])
    context.notes["added"] = added + await _copy_blobs(context)


async def _copy_blobs(context: Context[BackupRequest]) -> int:
    services, folder, vm = context.services, _folder(context), context.request.vm
    sources = {blob: services.layout.blob(blob) for blob in sorted(blobs_of(vm.spec))}
    if context.notes["nvram"] is not None:
        sources[context.notes["nvram"]] = _variables(context)
    added = 0
    for blob, source in sources.items():
        if not source.exists():
            raise StorageFailed(f"{vm.name}: a file of it is gone", f"there is no {source}")
        total = Total(context.report, source.stat().st_size, "copy files")
        added += await backup_files.store_blob(folder, source, blob, total=total, temporary=context.request.id)
    return added


async def _remove_unfinished(context: Context[BackupRequest]) -> None:
    """The folder may be gone, or unwritable; then its next writer does it."""
    with contextlib.suppress(OSError):
        for left in _folder(context).temporary.glob(f"{context.request.id}-*"):
            left.unlink(missing_ok=True)


async def _record(context: Context[BackupRequest]) -> None:
    services, folder, request = context.services, _folder(context), context.request
    backup = _backup(context, folder)
    with backup_folder.told(folder, f"write to {folder.path}"):
        backup_manifests.put_manifest(folder, backup)
    _variables(context).unlink(missing_ok=True)
    data = {"backup": backup.id, "folder": request.to, "added": backup.added}
    services.records.add_event("vm.backup", vm_id=request.vm.id, name=request.vm.name, data=data)


def _backup(context: Context[BackupRequest], folder: BackupFolder) -> Backup:
    request, vm, notes = context.request, context.request.vm, context.notes
    disks = msgspec.convert(notes["disks"], tuple[BackupDisk, ...])
    tops = {disk.name: next(reversed(disk.chain), None) for disk in disks}
    specs = tuple(replace(disk, layer=tops.get(disk.name)) for disk in without_heads(vm.spec.disks))
    layers = dict.fromkeys(layer for disk in disks for layer in disk.chain)
    blobs = blobs_of(vm.spec) | ({notes["nvram"]} if notes["nvram"] else set())
    return Backup(
        id=request.id,
        vm_id=vm.id,
        vm_name=vm.name,
        created_at=notes["at"],
        image=vm.image,
        spec=replace(vm.spec, disks=specs),
        disks=disks,
        layers=tuple(_stored(folder, layer) for layer in layers),
        blobs=tuple(StoredBlob(sha256=blob, size=folder.blob(blob).stat().st_size) for blob in sorted(blobs)),
        nvram=notes["nvram"],
        message=request.message,
        labels=vm.labels,
        quiesced=notes["quiesced"],
        seeded=vm.seeded,
        added=notes["added"],
    )


def _stored(folder: BackupFolder, layer_id: str) -> StoredLayer:
    stored = backup_folder.stored_layer(folder, layer_id)
    if stored is None:
        raise StorageFailed(f"{folder.layer(layer_id)} is gone", "something else changes that folder", "Try again.")
    return stored


async def _unrecord(context: Context[BackupRequest]) -> None:
    folder = _folder(context)
    with contextlib.suppress(OSError, AtollError):
        _manifest(folder, context.request).unlink(missing_ok=True)
        _manifest(folder, context.request).parent.rmdir()


BACKUP = Verb(
    name="backup",
    request=BackupRequest,
    steps=(
        Step("cut", _cut, _remove_variables),
        Step("copy", _copy, _remove_unfinished),
        Step("record", _record, _unrecord),
    ),
)
