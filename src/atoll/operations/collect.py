"""What is needed, and the removal of what isn't: layers, plain files, memory, templates, unfinished folders."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from msgspec import Struct

from atoll.model.names import SHORT_ID
from atoll.model.spec import VmSpec
from atoll.operations.services import Services
from atoll.operations.transfers import is_awaited

UNFINISHED_MEMORY = "memory-"
"""How the name of memory begins that is being written; the rest is the id that it will have."""


class Needed(Struct):
    """Ids of layers and memory, SHA-256 of blobs."""

    layers: set[str]
    blobs: set[str]
    memory: set[str]
    chains_known: bool = True
    """Whether each layer has a record: without it nobody knows which ones are below it."""


def needed_by(specs: Iterable[VmSpec]) -> Needed:
    found = Needed(set(), set(), set())
    for spec in specs:
        found.layers |= {disk.layer for disk in spec.disks if disk.layer}
        found.blobs |= {disk.blob for disk in spec.disks if disk.blob}
        found.blobs |= {blob for blob in (spec.boot.kernel, spec.boot.initrd, spec.boot.rom) if blob}
    return found


def needed(services: Services, *, without: Collection[str] = (), reads_no_more: str = "") -> Needed:
    """What VMs, snapshots and images need, but for the images whose ids are in `without`; layers with those below.

    An unfinished operation needs what it copies, unless its request has the id `reads_no_more`.
    """
    records = services.records
    vms, snapshots = records.vms(), records.snapshots()
    specs = [spec for vm in vms for spec in (vm.spec, vm.pending) if spec] + [node.spec for node in snapshots]
    found = needed_by(specs)
    found.blobs |= {node.nvram for node in snapshots if node.nvram}
    found.memory |= {node.memory.id for node in snapshots if node.memory}
    found.memory |= {vm.suspended.id for vm in vms if vm.suspended}
    for image in records.images():
        if image.id not in without:
            found.layers |= set(image.layer_ids)
            found.blobs |= set(image.blob_ids)
    for operation in records.operations(unfinished=True):
        if reads_no_more and operation.request.get("id") == reads_no_more:
            continue
        # A full copy reads layers that need not be anybody's any more, and the clone of a VM its UEFI variables.
        found.layers |= set(operation.request.get("copies", {}).values())
        found.blobs |= {blob for blob in (operation.request.get("nvram"),) if blob}
    # Memory for copies is written among the templates.
    found.memory |= _being_written(services)
    below = {layer.id: layer.parent for layer in records.layers()}
    found.chains_known = add_those_below(found.layers, below)
    return found


def add_those_below(layers: set[str], below: dict[str, str | None]) -> bool:
    """Complete the set with the parents; returns whether all have records. Ends also where records go in a circle."""
    known, left = True, list(layers)
    while left:
        layer = left.pop()
        known = known and layer in below
        parent = below.get(layer)
        if parent is not None and parent not in layers:
            layers.add(parent)
            left.append(parent)
    return known


def collect(
    services: Services,
    *,
    dry_run: bool,
    without: Collection[str] = (),
    reads_no_more: str = "",
    templates: bool = False,
) -> list[tuple[str, int]]:
    """Remove what nothing needs; names, and the bytes that it frees. The caller holds the images' lock.

    With `templates` also those that can be made again. Raises `OSError`.
    """
    layout = services.layout
    # Looked at before the records are: what an operation makes meanwhile isn't in it.
    there = [path for each in (layout.layers, layout.blobs, layout.memory) for path in _files_in(each)]
    mapped, unfinished = _files_in(layout.templates), _in(layout.temporary)
    wanted = needed(services, without=without, reads_no_more=reads_no_more)
    by_folder = {layout.layers: wanted.layers, layout.blobs: wanted.blobs, layout.memory: wanted.memory}
    unneeded = [path for path in there if path.stem not in by_folder[path.parent]]
    if not wanted.chains_known:
        unneeded = [path for path in unneeded if path.parent != layout.layers]
    kept = needed_templates(services) if templates else wanted.memory
    unneeded += [path for path in mapped if path.stem not in kept]
    unneeded += _unfinished_by_nobody(services, unfinished, pruning=templates)
    found: dict[str, int] = {}
    for path in unneeded:
        name = _name(services, path)
        found[name] = found.get(name, 0) + size_of(path)
    if not dry_run:
        # Records first: a record without its file would be worse than a file without a record.
        if wanted.chains_known:
            services.records.remove_layers({layer.id for layer in services.records.layers()} - wanted.layers)
        for path in unneeded:
            _remove(path)
        if not _being_written(services):
            with contextlib.suppress(OSError):
                layout.templates.rmdir()
    return list(found.items())


def _in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _files_in(folder: Path) -> list[Path]:
    return [path for path in _in(folder) if path.is_file()]


def _being_written(services: Services) -> set[str]:
    ids = [operation.request.get("id") for operation in services.records.operations(unfinished=True)]
    return {f"{UNFINISHED_MEMORY}{each}" for each in ids if each}


def needed_templates(services: Services) -> set[str]:
    """Those that can't be made again, for their memory is nowhere else; and those that copies are about to map."""
    records = services.records
    volatile = {node.memory.id for node in records.snapshots() if node.memory and node.memory.volatile}
    starting = {vm.suspended.id for vm in records.vms() if vm.suspended and vm.suspended.shared}
    return volatile | starting | _being_written(services)


def _unfinished_by_nobody(services: Services, there: list[Path], *, pruning: bool) -> list[Path]:
    """Those temporary files and folders that no unfinished operation will come back to, and no transfer."""
    operations = services.records.operations(unfinished=True)
    wanted = {operation.subject for operation in operations} | {o.request.get("id") for o in operations}
    return [
        path
        for path in there
        if path.name not in wanted
        and path.name.partition("-")[2] not in wanted
        and os.path.lexists(path)
        and not is_awaited(path, pruning=pruning)
    ]


def _name(services: Services, path: Path) -> str:
    layout = services.layout
    if path.parent == layout.temporary:
        return f"unfinished {path.name}"
    kind = "template" if path.parent == layout.templates else path.parent.name.removesuffix("s")
    return f"{kind} {path.stem[:SHORT_ID]}"


def size_of(path: Path) -> int:
    """Bytes that a file, or a folder with all in it, takes on the disk. What goes meanwhile counts for nothing."""
    total = 0
    for each in (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,):
        with contextlib.suppress(FileNotFoundError):
            if each.is_file() and not each.is_symlink():
                total += each.stat().st_blocks * 512
    return total


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
