"""restore --from: a stopped VM from a folder of backups

step      do                                                         undo
record    add the VM's record (reserves the name)                    take it away, and unneeded layers
copy      layers and plain files, each compared with its checksum    remove the folder of unfinished files
adopt     give them their last names, record the layers
files     its folder: heads, UEFI variables, seed                    remove the folder
tell      the event; the folder of unfinished files is removed
"""

import shutil
import time
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, AtollError, ImageRefused, StorageFailed
from atoll.host import disks, files
from atoll.model.backup import Backup, StoredBlob, StoredLayer, blobs_of
from atoll.model.image import Layer
from atoll.model.names import check_vm_name, new_id
from atoll.model.vm import Vm
from atoll.operations import adopt, backup_files, backup_find, backup_fit, networks
from atoll.operations.backup_files import Total, Vanished
from atoll.operations.backup_fit import Arrival
from atoll.operations.check_spec import check_spec
from atoll.operations.create import IMAGES_LOCK, NewVm, make_files, remove_files
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.resolve_disks import with_heads
from atoll.operations.services import Report, Services
from atoll.store import backup_folder
from atoll.store.backup_folder import BackupFolder

DAMAGED = "Nothing was changed. `atoll backup verify --in {}` tells which backups are whole."


class RestoreBackupRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    folder: str
    backup: Backup
    new: NewVm
    arrivals: list[Arrival]
    copies: dict[str, str]
    """Layers that are here and that disks will stand on; held until the end."""


async def restore_backup(
    path: str | Path, reference: str | None, name: str | None, *, services: Services, report: Report | None = None
) -> Vm:
    """A new VM with the disks and the machine of a backup. Raises `NotFound`, `AlreadyExists` (the name),
    `StorageFailed` when something in the folder is damaged; nothing is changed then.
    """
    backup = backup_find.find(path, reference)
    try:
        check_spec(backup.spec)
    except AtollError as error:
        raise StorageFailed(
            f"the backup {backup.id} can't be restored",
            f"its machine can't be: {error.what}",
            "Try another: `atoll backup ls` lists them.",
        ) from error
    wanted = check_vm_name(name or backup.vm_name)
    if any(vm.name == wanted for vm in services.records.vms()):
        raise AlreadyExists(f"there is a VM '{wanted}' already", next_step="Give the new VM another name as last word.")
    folder = backup_folder.located(path)
    arrivals = await backup_fit.arrivals(backup, services, report or (lambda progress: None))
    vm = _vm(backup, wanted, arrivals, services)
    # Beside the machine that was backed up it is a copy of that, with an identity of its own.
    new = NewVm(vm=vm, copy=services.records.vm(backup.vm_id) is not None)
    copies = {each.disk: each.base for each in arrivals if each.base is not None}
    request = RestoreBackupRequest(folder=str(folder.path), backup=backup, new=new, arrivals=arrivals, copies=copies)
    await perform(RESTORE_BACKUP, request, services=services, subject=vm.id, subject_name=vm.name, report=report)
    return services.vm(vm.id)


def _vm(backup: Backup, name: str, arrivals: list[Arrival], services: Services) -> Vm:
    tops = {each.disk: each.top for each in arrivals}
    specs = with_heads(replace(disk, layer=tops.get(disk.name)) for disk in backup.spec.disks)
    return Vm(
        id=new_id(),
        name=name,
        image=backup.image,
        created_at=time.time(),
        spec=replace(backup.spec, disks=specs, nics=backup_fit.fitting_nics(backup, services), shares=()),
        labels=backup.labels,
        seeded=backup.seeded,
    )


Here = Context[RestoreBackupRequest]


def _unfinished(context: Here) -> Path:
    return context.services.layout.temporary / f"backup-{context.subject}"


async def _record(context: Here) -> None:
    services, request = context.services, context.request
    async with services.lease(IMAGES_LOCK, what="the images"):
        if any(services.records.layer(layer) is None for layer in request.copies.values()):
            raise StorageFailed("a layer was removed at this moment", next_step="Try again.")
        if services.records.vm(context.subject) is None:
            async with networks.addressed(services, request.new.vm) as vm:
                services.records.add_vm(vm)


async def _unrecord(context: Here) -> None:
    services = context.services
    # On a full disk it can be seen that there is nothing to remove, and not be written.
    if services.records.vm(context.subject) is not None:
        services.records.remove_vm(context.subject)
    await adopt.discard(services, _outside(context))


def _outside(context: Here) -> adopt.Outside:
    """What is adopted: each layer once, also when several disks stand on it."""
    request, source = context.request, _unfinished(context)
    stored = {layer.id: layer for layer in request.backup.layers}
    layers = {layer.id: (file, layer) for each in request.arrivals for file, layer in _layers_of(each, stored)}
    blobs = sorted(blobs_of(request.backup.spec))
    return adopt.Outside(
        layers=[(source / f"{file}.qcow2", layer) for file, layer in layers.values()],
        blobs=[(source / blob, blob) for blob in blobs],
    )


async def _copy(context: Here) -> None:
    request, target = context.request, _unfinished(context)
    folder = BackupFolder(Path(request.folder))
    shutil.rmtree(target, ignore_errors=True)
    files.make_folder(target)
    stored = {layer.id: layer for layer in request.backup.layers}
    wanted = [stored[layer] for layer in dict.fromkeys(layer for each in request.arrivals for layer in each.new)]
    blobs = [blob for blob in request.backup.blobs if not _is_here(context, blob)]
    size = sum(layer.size for layer in wanted) + sum(blob.size for blob in blobs)
    total = Total(context.report, size, "copy and check")
    for layer in wanted:
        path = target / f"{layer.id}.qcow2"
        await _fetch(folder, folder.layer(layer.id), path, layer.sha256, total)
        _check_header(folder, path, layer)
    for blob in blobs:
        await _fetch(folder, folder.blob(blob.sha256), target / blob.sha256, blob.sha256, total)
    for each in request.arrivals:
        if each.flat is not None:
            chain = [target / f"{layer}.qcow2" for layer in each.new]
            await disks.copy_content(chain, target / f"{each.flat}.qcow2", size=each.size, report=context.report)


def _is_here(context: Here, blob: StoredBlob) -> bool:
    """UEFI variables are copied in any case: nothing would hold those that a snapshot here has."""
    return blob.sha256 != context.request.backup.nvram and context.services.layout.blob(blob.sha256).exists()


async def _fetch(folder: BackupFolder, source: Path, target: Path, sha256: str, total: Total) -> None:
    try:
        found, _ = await backup_files.read(source, total=total, copy_to=target)
    except Vanished:
        raise _damaged(folder, f"{source} is missing") from None
    if found != sha256:
        raise _damaged(folder, f"the content of {source} has changed: its checksum is another")


def _check_header(folder: BackupFolder, path: Path, layer: StoredLayer) -> None:
    try:
        size = backup_files.size_of_layer(path)
    except ImageRefused as error:
        raise _damaged(folder, f"the layer {layer.id}: {error.why}") from error
    if size != layer.virtual_size:
        raise _damaged(folder, f"the layer {layer.id} has a disk of another size")


def _damaged(folder: BackupFolder, why: str) -> StorageFailed:
    return StorageFailed("the backup can't be restored", why, DAMAGED.format(folder.path))


async def _remove_unfinished(context: Here) -> None:
    if _unfinished(context).exists():
        shutil.rmtree(_unfinished(context))


async def _adopt(context: Here) -> None:
    records = context.services.records
    await adopt.adopt(
        context.services, _outside(context), lambda new: records.freeze(context.services.vm(context.subject), new)
    )


def _layers_of(arrival: Arrival, stored: dict[str, StoredLayer]) -> list[tuple[str, Layer]]:
    """The names of the files, and the records to be. One under another id says whose content it has: so the next
    backup needn't copy it.
    """
    if arrival.flat is not None:
        flat = Layer(id=arrival.flat, virtual_size=arrival.size, file_size=0, merged=tuple(arrival.new))
        return [(arrival.flat, flat)]
    layers: list[tuple[str, Layer]] = []
    parent = arrival.base
    for theirs, ours in arrival.new.items():
        layer = Layer(
            id=ours,
            virtual_size=stored[theirs].virtual_size,
            file_size=0,
            sha256=stored[theirs].sha256,
            parent=parent,
            merged=() if theirs == ours else (theirs,),
        )
        layers.append((theirs, layer))
        parent = ours
    return layers


async def _files(context: Here) -> None:
    services, request = context.services, context.request
    inner: Context[NewVm] = Context(
        services=services, subject=context.subject, request=request.new, report=context.report
    )
    await make_files(inner)
    if request.backup.nvram is not None:
        copied = _unfinished(context) / request.backup.nvram
        files.write_atomically(services.layout.vm(context.subject).nvram, copied.read_bytes())


async def _tell(context: Here) -> None:
    vm, backup = context.request.new.vm, context.request.backup
    await _remove_unfinished(context)
    data = {"backup": backup.id, "of": backup.vm_name, "folder": context.request.folder}
    context.services.records.add_event("vm.created", vm_id=vm.id, name=vm.name, data=data)


RESTORE_BACKUP = Verb(
    name="restore backup",
    request=RestoreBackupRequest,
    steps=(
        Step("record", _record, _unrecord),
        Step("copy", _copy, _remove_unfinished),
        Step("adopt", _adopt),
        Step("files", _files, remove_files),
        Step("tell", _tell),
    ),
)
