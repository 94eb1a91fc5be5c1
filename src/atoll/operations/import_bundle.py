"""import: a stopped VM of a bundle, with the node that was exported in its history.

    step      do                                                                   undo
    receive   read the bundle into a folder of its own, checking every byte        remove the folder
    adopt     its files become layers, blobs and memory, recorded together         take the records away, and what
              with the VM and its snapshot                                         nothing else needs
    files     the VM's folder: heads, UEFI variables, seed, its name to be told    remove the folder
    tell      the event; clear the folder

The bundle is open before it begins, so that a pipe serves too; its names are given anew where they could clash: the VM
and its snapshot have other ids than where they come from. Layers keep theirs, and so are shared.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, InvalidInput, NotFound, from_os_error
from atoll.host import facts, files
from atoll.images.source import in_thread, progress_teller, shown
from atoll.model.bundle import Manifest
from atoll.model.image import Layer
from atoll.model.names import SHORT_ID, check_vm_name, new_id
from atoll.model.snapshot import Snapshot
from atoll.model.vm import Vm
from atoll.operations import bundle_read, create, networks
from atoll.operations.adopt import Outside, adopt, agree, check_layer, discard
from atoll.operations.bundle_format import members
from atoll.operations.bundle_read import Stream, path_of
from atoll.operations.clone import own
from atoll.operations.create import NewVm
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.heads import allocated
from atoll.operations.services import Report, Services

Source = str | os.PathLike[str] | BinaryIO


class ImportBundleRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    snapshot_id: str
    memory_id: str
    descriptor: int
    """The bundle, in the process that began."""
    name: str | None = None
    """The VM's; the exported one's when None."""


async def import_bundle(source: Source, name: str | None, *, services: Services, report: Report | None = None) -> Vm:
    """Take in a bundle from a path, or from a file that is open; nothing is kept unless all of it is right.

    Raises `ImageRefused`, `AlreadyExists` (name), `NotFound` (its base, the file), `StorageFailed`.
    """
    if name is not None:
        check_vm_name(name)
        _check_free(services, name)
    with _opened_source(source) as (descriptor, what):
        request = ImportBundleRequest(
            vm_id=new_id(), snapshot_id=new_id(), memory_id=new_id(), descriptor=descriptor, name=name
        )
        await perform(
            IMPORT, request, services=services, subject=request.vm_id, subject_name=name or what, report=report
        )
    return services.vm(request.vm_id)


@contextlib.contextmanager
def _opened_source(source: Source) -> Iterator[tuple[int, str]]:
    """A descriptor, and what to call it."""
    if not isinstance(source, str | os.PathLike):
        yield source.fileno(), "a bundle"
        return
    path = Path(source)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {shown(path)}", next_step="Check its path.") from error
    except (OSError, ValueError) as error:
        failure = error if isinstance(error, OSError) else OSError(22, str(error))
        raise from_os_error(OSError(failure.errno, failure.strerror), f"read {shown(path)}") from error
    try:
        if path.is_dir():
            raise InvalidInput(f"{shown(path)} is a folder", next_step="Give the path of a bundle.")
        yield descriptor, shown(path.name)
    finally:
        os.close(descriptor)


def _check_free(services: Services, name: str) -> None:
    if any(vm.name == name for vm in services.records.vms()):
        raise AlreadyExists(
            f"there is a VM '{name}' already", next_step=f"Give another name: `atoll import FILE {name}-2`."
        )


# Steps


def _folder(context: Context[ImportBundleRequest]) -> Path:
    return context.services.layout.temporary / f"import-{context.subject}"


async def _receive(context: Context[ImportBundleRequest]) -> None:
    folder, request, services = _folder(context), context.request, context.services
    if folder.exists():
        shutil.rmtree(folder)
    files.make_folder(folder)
    manifest = await in_thread(lambda look: bundle_read.read_manifest(Stream(request.descriptor, look)))
    _check_free(services, request.name or manifest.snapshot.vm_name)
    layers = [each.layer for each in manifest.layers]
    here = await agree(services, layers, context.report)
    wanted = _wanted(manifest, here)
    _check_blobs(services, manifest)
    coming = [member for member in members(manifest) if member.kind != "layer" or member.id in wanted]
    facts.check_room(folder, sum(member.size for member in coming), what="the bundle")
    tell = progress_teller(context.report, step="receive", total=sum(member.size for member in members(manifest)))

    def receive(look: Any) -> None:
        stream = Stream(request.descriptor, look)
        bundle_read.read_members(stream, manifest, folder, wanted=wanted, tell=tell)
        for layer in layers:
            if layer.id in wanted:
                check_layer(path_of(folder, "layer", layer.id), layer)

    await in_thread(receive)
    context.notes["bundle"] = msgspec.to_builtins(_placed(manifest, wanted, here))


def _wanted(manifest: Manifest, here: dict[str, str]) -> set[str]:
    """The layers that have to come. Raises `NotFound` for one that was left out and isn't here."""
    known = {each.layer.id: each for each in manifest.layers}
    wanted: set[str] = set()
    for top in manifest.snapshot.layer_ids:
        layer_id: str | None = top
        while layer_id is not None and layer_id not in here:
            if not known[layer_id].included:
                raise _without_base(manifest, f"the layer {layer_id[:SHORT_ID]}")
            wanted.add(layer_id)
            layer_id = known[layer_id].layer.parent
    return wanted


def _check_blobs(services: Services, manifest: Manifest) -> None:
    """Raises `NotFound` for a file that was left out and isn't here."""
    for blob in manifest.blobs:
        if not blob.included and not services.layout.blob(blob.sha256).exists():
            raise _without_base(manifest, f"the file {blob.sha256[:SHORT_ID]}")


def _without_base(manifest: Manifest, what: str) -> NotFound:
    return NotFound(
        f"the bundle stands on '{shown(manifest.base) or 'another one'}', which isn't here",
        f"{what} is missing",
        "Import that first, or export this one without --base.",
    )


class Placed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came, with the parents and layers that there are here."""

    node: Snapshot
    layers: tuple[Layer, ...]
    blobs: tuple[str, ...]
    left_out: tuple[str, ...]
    """Blobs that have to be here."""

    def outside(self, folder: Path, memory_id: str) -> Outside:
        return Outside(
            layers=[(path_of(folder, "layer", layer.id), layer) for layer in self.layers],
            blobs=[(path_of(folder, "blob", blob), blob) for blob in self.blobs],
            memory=[(path_of(folder, "memory", ""), memory_id)] if self.node.memory is not None else [],
        )


def _placed(manifest: Manifest, wanted: set[str], here: dict[str, str]) -> Placed:
    layers = [each.layer for each in manifest.layers if each.layer.id in wanted]
    disks = tuple(replace(disk, layer=here.get(disk.layer or "", disk.layer)) for disk in manifest.snapshot.spec.disks)
    nics = tuple(networks.alone(replace(nic, ports=(), groups=(), limit=0)) for nic in manifest.snapshot.spec.nics)
    # The folders are another computer's; its memory knows their ports, though.
    folders = tuple(replace(share, host_path="") for share in manifest.snapshot.spec.shares)
    return Placed(
        node=replace(manifest.snapshot, spec=replace(manifest.snapshot.spec, disks=disks, nics=nics, shares=folders)),
        layers=tuple(replace(layer, parent=here.get(layer.parent or "", layer.parent)) for layer in layers),
        blobs=tuple(blob.sha256 for blob in manifest.blobs if blob.included),
        left_out=tuple(blob.sha256 for blob in manifest.blobs if not blob.included),
    )


def _noted(context: Context[ImportBundleRequest]) -> Placed:
    return msgspec.convert(context.notes["bundle"], Placed)


async def _remove_folder(context: Context[ImportBundleRequest]) -> None:
    folder = _folder(context)
    if folder.exists():
        shutil.rmtree(folder)


async def _adopt(context: Context[ImportBundleRequest]) -> None:
    services, request, placed = context.services, context.request, _noted(context)
    outside = placed.outside(_folder(context), request.memory_id)
    node = _node(context, placed)
    vm = Vm(
        id=request.vm_id,
        name=node.vm_name,
        image=node.image,
        created_at=time.time(),
        spec=own(replace(node.spec, shares=())),
        snapshot=node.id,
    )

    def record(new: Sequence[Layer]) -> None:
        there = {layer.id for layer in (*services.records.layers(), *new)}
        gone = [layer for layer in node.layer_ids if layer not in there]
        gone += [blob for blob in placed.left_out if not services.layout.blob(blob).exists()]
        if gone:
            raise NotFound(f"{gone[0][:SHORT_ID]} is gone, which was here", "another command removed it", "Try again.")
        if services.records.vm(vm.id) is None:
            services.records.add_vm(vm, new, [node])

    await adopt(services, outside, record)


def _node(context: Context[ImportBundleRequest], placed: Placed) -> Snapshot:
    """The snapshot as it is here."""
    request, memory = context.request, placed.node.memory
    if memory is not None:
        path = path_of(_folder(context), "memory", "")
        path = path if path.exists() else context.services.layout.memory_file(request.memory_id)
        memory = replace(memory, id=request.memory_id, file_size=allocated(path), shared=False, volatile=False)
    return replace(
        placed.node,
        id=request.snapshot_id,
        vm_id=request.vm_id,
        vm_name=request.name or placed.node.vm_name,
        parent=None,
        memory=memory,
    )


async def _unadopt(context: Context[ImportBundleRequest]) -> None:
    services, request = context.services, context.request
    # On a full disk it can be seen that there is nothing to remove, and not be written.
    if services.records.snapshot(request.snapshot_id) is not None:
        services.records.remove_snapshot(request.snapshot_id)
    if services.records.vm(request.vm_id) is not None:
        services.records.remove_vm(request.vm_id)
    if "bundle" in context.notes:
        await discard(services, _noted(context).outside(_folder(context), request.memory_id))


def _creation(context: Context[ImportBundleRequest]) -> Context[NewVm]:
    """The making of the VM's files, which is as for any new VM."""
    vm = context.services.vm(context.subject)
    new = NewVm(vm=vm, nvram=_noted(context).node.nvram, copy=True)
    return Context(services=context.services, subject=vm.id, request=new, report=context.report)


async def _files(context: Context[ImportBundleRequest]) -> None:
    await create.make_files(_creation(context))


async def _tell(context: Context[ImportBundleRequest]) -> None:
    await _remove_folder(context)
    vm = context.services.vm(context.subject)
    context.services.records.add_event("vm.imported", vm_id=vm.id, name=vm.name, data={"image": vm.image})


IMPORT = Verb(
    name="import",
    request=ImportBundleRequest,
    steps=(
        Step("receive", _receive, _remove_folder),
        Step("adopt", _adopt, _unadopt),
        Step("files", _files, create.remove_files),
        Step("tell", _tell),
    ),
)
