"""export: a node and the layers under it as one file.

    step     do                                                               undo
    write    the bundle beside its last name, made durable                    remove that
    name     rename it                                                        (point of no return)

The present of a VM is cut first (`clone`). A bundle that goes to a stream has no name: whoever reads sees its end.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import InvalidInput, NotFound, from_os_error
from atoll.host import files
from atoll.images.source import in_thread, progress_teller
from atoll.model.bundle import BundledBlob, BundledLayer, ExportOptions, Manifest
from atoll.model.image import Image, Layer
from atoll.model.names import SHORT_ID, new_id
from atoll.model.snapshot import Snapshot
from atoll.model.vm import Vm
from atoll.operations import bundle_write
from atoll.operations.adopt import with_sha256
from atoll.operations.bundle_format import members, stored_size
from atoll.operations.bundle_write import Opened
from atoll.operations.clone import find_source, present
from atoll.operations.collect import needed_by
from atoll.operations.create import IMAGES_LOCK, find_image
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.resolve_disks import without_heads
from atoll.operations.services import Report, Services
from atoll.operations.template import memory_path
from atoll.qemu.plan import layer_chain

Target = str | os.PathLike[str] | BinaryIO
PRESENT = "exported"
"""The name of the node that a VM's present becomes."""


class ExportRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    target: str
    """The path; empty for a stream."""
    descriptor: int | None
    """The stream's, in the process that began."""
    node: Snapshot
    present_of: str | None = None
    """The VM whose present the node is; its UEFI variables are where it has them."""
    left_out: tuple[str, ...] = ()
    """The layers and blobs that the base has too."""
    base: str = ""

    @property
    def part(self) -> Path:
        """The file until it is whole."""
        return Path(self.target).with_name(f".atoll-export-{self.id}.part")


async def export(
    source: Vm | Snapshot, target: Target, options: ExportOptions, *, services: Services, report: Report | None = None
) -> None:
    """Write a bundle to a path, or to a file that is open. A file that is there is replaced once the new one is whole.

    Raises `InvalidInput`, `NotFound` (base, folder), `WrongState`, `StorageFailed`.
    """
    with _opened_target(target) as (path, descriptor):
        node = source if isinstance(source, Snapshot) else await _present(source, services, report)
        if options.disk_only or (node.memory is not None and node.memory.volatile):
            node = replace(node, memory=None)
        request = ExportRequest(
            id=new_id(),
            target=path,
            descriptor=descriptor,
            node=node,
            present_of=source.id if isinstance(source, Vm) else None,
            left_out=_left_out(services, node, options.base) if options.base is not None else (),
            base=options.base or "",
        )
        await perform(EXPORT, request, services=services, subject=request.id, subject_name=node.vm_name, report=report)


@contextlib.contextmanager
def _opened_target(target: Target) -> Iterator[tuple[str, int | None]]:
    """A path, or a descriptor. What is there and isn't a file (a pipe, a device) is written as a stream."""
    if not isinstance(target, str | os.PathLike):
        yield "", target.fileno()
        return
    path = Path(os.path.realpath(target))
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder", next_step="Name the file that is to be written.")
    if not path.parent.is_dir():
        raise NotFound(f"there is no folder {path.parent}", next_step="Make it first, or choose another path.")
    if not path.exists() or path.is_file():
        yield str(path), None
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error
    try:
        yield "", descriptor
    finally:
        os.close(descriptor)


async def _present(vm: Vm, services: Services, report: Report | None) -> Snapshot:
    """A node that nothing records."""
    spec = await present(vm, services, report)
    nics = tuple(replace(nic, ports=()) for nic in spec.nics)
    return Snapshot(
        id=new_id(),
        name=PRESENT,
        vm_id=vm.id,
        vm_name=vm.name,
        image=vm.image,
        created_at=time.time(),
        spec=replace(spec, nics=nics, disks=without_heads(spec.disks)),
        parent=vm.snapshot,
        seeded=vm.seeded,
    )


def _left_out(services: Services, node: Snapshot, base: str) -> tuple[str, ...]:
    """The layers and blobs that the base has too. Raises `NotFound`, `InvalidInput` when it has none of the layers."""
    try:
        found = find_image(base, services.records.images()) if "@" not in base else find_source(base, services)
    except NotFound:
        found = find_source(base, services)
    if isinstance(found, Vm):
        raise InvalidInput(f"'{base}' is a VM, and goes on changing", next_step=f"Name a snapshot: {base}@NAME.")
    layers = {layer.id: layer for layer in services.records.layers()}
    theirs = {layer for top in found.layer_ids for layer in layer_chain(top, layers)}
    shared = [layer for layer in _chain(node, layers) if layer in theirs]
    if not shared:
        raise InvalidInput(
            f"'{base}' is no base of '{node.vm_name}'", "they have no layer in common", "Leave --base away."
        )
    blobs = found.blob_ids if isinstance(found, Image) else _blobs(found)
    return (*shared, *sorted(_blobs(node) & set(blobs)))


def _blobs(node: Snapshot) -> set[str]:
    return needed_by([node.spec]).blobs | ({node.nvram} if node.nvram else set())


def _chain(node: Snapshot, layers: dict[str, Layer]) -> list[str]:
    """The layers that the node needs, each after the one below it."""
    return list(dict.fromkeys(layer for top in node.layer_ids for layer in layer_chain(top, layers)))


# Steps


async def _write(context: Context[ExportRequest]) -> None:
    request = context.request
    with contextlib.ExitStack() as stack:
        try:
            manifest, opened = await _gathered(context, stack)
            descriptor = request.descriptor
            if descriptor is None:
                descriptor = os.open(request.part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, descriptor)
            tell = progress_teller(context.report, step="write", total=stored_size(manifest))
            await in_thread(lambda look: bundle_write.write(descriptor, manifest, opened, look=look, tell=tell))
            if request.descriptor is None:
                await in_thread(lambda look: os.fsync(descriptor))
        except OSError as error:
            raise from_os_error(error, f"write {request.target or 'the bundle'}") from error


async def _gathered(context: Context[ExportRequest], stack: contextlib.ExitStack) -> tuple[Manifest, dict[str, Opened]]:
    """The manifest, and the files of its members, open until the stack ends."""
    services, request, node = context.services, context.request, context.request.node
    known = {layer.id: layer for layer in services.records.layers()}
    if gone := [layer for layer in node.layer_ids if layer not in known]:
        raise NotFound(f"the layer {gone[0][:SHORT_ID]} is gone", "another command removed it", "Try again.")
    layers = await with_sha256(services, [known[layer] for layer in _chain(node, known)], context.report)
    descriptors: dict[str, int] = {}

    def keep(key: str, path: Path) -> int:
        descriptors[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptors[key])
        return os.fstat(descriptors[key]).st_size

    layout, memory = services.layout, None
    # Once they are open they can be read to their end, whatever is removed.
    async with services.lease(IMAGES_LOCK, what="the images"):
        bundled = tuple(
            BundledLayer(
                layer=layer, size=keep(layer.id, layout.layer(layer.id)), included=layer.id not in request.left_out
            )
            for layer in layers
        )
        plain_files = [
            BundledBlob(sha256=blob, size=keep(blob, layout.blob(blob)), included=blob not in request.left_out)
            for blob in sorted(_blobs(node))
        ]
        if node.memory is not None:
            keep("", memory_path(layout, node.memory))
    if request.present_of is not None:
        node, plain_files = _with_variables(services, node, request.present_of, plain_files, descriptors, stack)
    parts = {key: bundle_write.plain(descriptor) for key, descriptor in descriptors.items() if key}
    if node.memory is not None:
        parts[""], memory = await in_thread(lambda look: bundle_write.memory(descriptors[""], look))
    manifest = Manifest(
        created_at=time.time(),
        snapshot=node,
        layers=bundled,
        blobs=tuple(plain_files),
        memory=memory,
        base=request.base,
    )
    return manifest, {member.name: parts[member.id] for member in members(manifest)}


def _with_variables(
    services: Services,
    node: Snapshot,
    vm_id: str,
    blobs: list[BundledBlob],
    descriptors: dict[str, int],
    stack: contextlib.ExitStack,
) -> tuple[Snapshot, list[BundledBlob]]:
    """The node with the VM's present UEFI variables, if it has any. The guest may write them, so a copy is taken."""
    path = services.layout.vm(vm_id).nvram
    if not path.exists():
        return node, blobs
    files.make_folder(services.layout.temporary)
    # It has no name, so there is nothing to clean up.
    copy = stack.enter_context(tempfile.TemporaryFile(dir=services.layout.temporary))  # noqa: SIM115
    with path.open("rb") as source:
        shutil.copyfileobj(source, copy)
    copy.flush()
    copy.seek(0)
    sha256 = hashlib.file_digest(copy, "sha256").hexdigest()
    blob = BundledBlob(sha256=sha256, size=copy.tell())
    descriptors[sha256] = copy.fileno()
    return replace(node, nvram=sha256), [*(each for each in blobs if each.sha256 != sha256), blob]


async def _remove_part(context: Context[ExportRequest]) -> None:
    if context.request.target:
        context.request.part.unlink(missing_ok=True)


async def _name(context: Context[ExportRequest]) -> None:
    request = context.request
    if not request.target:
        return
    target = Path(request.target)
    try:
        # It was renamed already if the process died right after that.
        if request.part.exists() or not target.exists():
            request.part.replace(target)
            files.sync_folder(target.parent)
    except OSError as error:
        raise from_os_error(error, f"write {target}") from error


EXPORT = Verb(
    name="export",
    request=ExportRequest,
    steps=(
        Step("write", _write, _remove_part),
        Step("name", _name, final=True),
    ),
)
