"""Taking files from outside as this Atoll's own: layers, plain files, memory. What `import` and backups end with.

    check      each file has the SHA-256 that is said of it; each layer is a qcow2 file that refers to no other
    agree      layers that are here already have the same content, so they needn't come at all
    adopt      freeze the files under their last names and record them together with what needs them, under one lock
    discard    undo: remove those that nothing needs

The files lie in a folder of the operation's own under `Layout.temporary`, named `SOMETHING-ID` with the operation's
subject, or its request's `id`, as ID: `prune` keeps it as long as the operation isn't finished. Each function may run
again after a crash.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from atoll.errors import ImageRefused, NotFound
from atoll.host import files
from atoll.images import qcow2
from atoll.images.made import Report
from atoll.images.source import DAMAGED, digest, opened
from atoll.model.image import Layer
from atoll.model.names import SHORT_ID
from atoll.operations.collect import needed
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.heads import allocated
from atoll.operations.services import Services

Recording = Callable[[Sequence[Layer]], None]
"""Writes the records of new layers, and of what needs them, in one transaction."""


@dataclass(frozen=True)
class Outside:
    """Files with the records that they are to have: layers (lowest first), blobs by SHA-256, memory by id.

    A layer's record has its `sha256`; its `parent` is one of the others, or is here.
    """

    layers: Sequence[tuple[Path, Layer]] = ()
    blobs: Sequence[tuple[Path, str]] = ()
    memory: Sequence[tuple[Path, str]] = ()


async def check(outside: Outside, report: Report) -> None:
    """Read all layers and blobs. Raises `ImageRefused` for one that isn't what is said of it, `StorageFailed`."""
    for path, layer in outside.layers:
        await check_content(path, layer.sha256, what=f"the layer {layer.id[:SHORT_ID]}", report=report)
        check_layer(path, layer)
    for path, sha256 in outside.blobs:
        await check_content(path, sha256, what=f"the file {sha256[:SHORT_ID]}", report=report)


async def check_content(path: Path, sha256: str, *, what: str, report: Report) -> None:
    """Raises `ImageRefused` unless the file has that SHA-256."""
    with opened(path) as source:
        if await digest(source, report=report, step="check") != sha256:
            raise ImageRefused(f"{what} can't be used", "its content isn't what its checksum says", DAMAGED)


def check_layer(path: Path, layer: Layer) -> None:
    """Raises `ImageRefused` unless the file is a qcow2 that refers to nothing, but for what is below its disk."""
    try:
        with opened(path) as source:
            size = qcow2.virtual_size(source, layered=layer.parent is not None)
    except ImageRefused as error:
        raise ImageRefused(f"the layer {layer.id[:SHORT_ID]} can't be used", error.why, error.next_step) from error
    if size != layer.virtual_size:
        raise ImageRefused(
            f"the layer {layer.id[:SHORT_ID]} can't be used",
            f"its disk has {size} bytes, and its record says {layer.virtual_size}",
            DAMAGED,
        )


def standing_in(layer_id: str, here: Collection[Layer]) -> str | None:
    """The layer here with that content: the layer itself, or the one that it and those below were merged into."""
    for layer in here:
        if layer_id == layer.id or layer_id in layer.merged[-1:]:
            return layer.id
    return None


async def agree(services: Services, layers: Sequence[Layer], report: Report) -> dict[str, str]:
    """Those of the layers that are here, and what each is here (itself, or what it was merged into).

    Raises `ImageRefused` when one that is here has other content, or an id that something else is to have.
    """
    here = services.records.layers()
    specs = [spec for vm in services.records.vms() for spec in (vm.spec, vm.pending) if spec]
    heads = {disk.head for spec in specs for disk in spec.disks if disk.head}
    found: dict[str, str] = {}
    for layer in layers:
        if layer.id in heads:
            raise _other(layer)
        own = standing_in(layer.id, here)
        if own is None:
            continue
        known = services.records.layer(own)
        if known is not None and own == layer.id:
            [known] = await with_sha256(services, [known], report)
            if (known.sha256, known.virtual_size) != (layer.sha256, layer.virtual_size):
                raise _other(layer)
        found[layer.id] = own
    return found


def _other(layer: Layer) -> ImageRefused:
    return ImageRefused(
        f"the layer {layer.id[:SHORT_ID]} can't be used",
        "there is one with this id here that has other content",
        "One of the two was altered: check where this one comes from.",
    )


async def with_sha256(services: Services, layers: Sequence[Layer], report: Report) -> list[Layer]:
    """The layers with their checksums; one that wasn't known yet is computed and recorded. Raises `StorageFailed`."""
    found = []
    for layer in layers:
        if not layer.sha256:
            with opened(services.layout.layer(layer.id)) as source:
                layer = replace(layer, sha256=await digest(source, report=report, step="read the layers"))
            services.records.note_sha256(layer.id, layer.sha256)
        found.append(layer)
    return found


async def adopt(services: Services, outside: Outside, record: Recording) -> None:
    """Freeze the files and have `record` write the records of those layers that are new; prune comes before or after.

    Raises `NotFound` when a layer below isn't here any more, `ImageRefused` when another one with its id has come
    meanwhile, `StorageFailed`, and what `record` raises.
    """
    layout = services.layout
    for folder in (layout.layers, layout.blobs, layout.memory):
        files.make_folder(folder)
    async with services.lease(IMAGES_LOCK, what="the images"):
        new = _freeze_layers(services, outside.layers)
        for path, sha256 in outside.blobs:
            freeze(path, layout.blob(sha256))
        for path, memory_id in outside.memory:
            freeze(path, layout.memory_file(memory_id))
        record(new)


def _freeze_layers(services: Services, layers: Sequence[tuple[Path, Layer]]) -> list[Layer]:
    """The records of those that weren't here."""
    known = {layer.id: layer for layer in services.records.layers()}
    coming = {layer.id for _, layer in layers}
    new = []
    for path, layer in layers:
        if layer.parent is not None and layer.parent not in known and layer.parent not in coming:
            raise NotFound(f"the layer {layer.parent[:SHORT_ID]} is gone", "another command removed it", "Try again.")
        final = services.layout.layer(layer.id)
        if layer.id in known:
            if known[layer.id].sha256 not in ("", layer.sha256):
                raise _other(layer)
            path.unlink(missing_ok=True)
        else:
            # A file that isn't recorded is one that an interrupted adoption left, perhaps of something else.
            if path.exists() or not final.exists():
                files.freeze(path, final)
            new.append(replace(layer, file_size=allocated(final)))
    return new


def freeze(temporary: Path, final: Path) -> None:
    """Move a file to its last name, unless that was done before a crash, or another one has the same content."""
    if final.exists():
        temporary.unlink(missing_ok=True)
    else:
        files.freeze(temporary, final)


async def discard(services: Services, outside: Outside) -> None:
    """Remove those of the files that were adopted and that nothing needs. What needed them has been taken away."""
    layout = services.layout
    async with services.lease(IMAGES_LOCK, what="the images"):
        wanted = needed(services)
        layers = {layer.id for _, layer in outside.layers} - wanted.layers
        recorded = {layer.id for layer in services.records.layers()} & layers
        # On a full disk it can be seen that there is nothing to remove, and not be written.
        if recorded:
            services.records.remove_layers(recorded)
        gone = [layout.layer(layer) for layer in layers]
        gone += [layout.blob(sha256) for _, sha256 in outside.blobs if sha256 not in wanted.blobs]
        gone += [layout.memory_file(each) for _, each in outside.memory if each not in wanted.memory]
        for path in gone:
            path.unlink(missing_ok=True)
