"""What is needed, and the removal of what isn't: layers, plain files, memory, unfinished folders."""

import contextlib
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from msgspec import Struct

from atoll.model.image import Image
from atoll.model.names import SHORT_ID
from atoll.model.spec import VmSpec
from atoll.operations.services import Services


class Needed(Struct):
    """Ids of layers and memory, SHA-256 of blobs."""

    layers: set[str]
    blobs: set[str]
    memory: set[str]


def needs(spec: VmSpec, image: Image) -> bool:
    """Whether a VM has something of the image's."""
    needed = needed_by([spec])
    return bool(needed.layers & set(image.layer_ids) or needed.blobs & set(image.blob_ids))


def needed_by(specs: Iterable[VmSpec]) -> Needed:
    found = Needed(set(), set(), set())
    for spec in specs:
        found.layers |= {disk.layer for disk in spec.disks if disk.layer}
        found.blobs |= {disk.blob for disk in spec.disks if disk.blob}
        found.blobs |= {blob for blob in (spec.boot.kernel, spec.boot.initrd, spec.boot.rom) if blob}
    return found


def needed(services: Services, *, without: Collection[str] = ()) -> Needed:
    """What VMs, snapshots and images need, but for the images whose ids are in `without`; layers with those below."""
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
        # A full copy reads layers that need not be anybody's any more.
        found.layers |= set(operation.request.get("copies", {}).values())
    known = {layer.id: layer for layer in records.layers()}
    for layer_id in list(found.layers):
        while (parent := known[layer_id].parent if layer_id in known else None) is not None:
            found.layers.add(parent)
            layer_id = parent
    return found


def collect(services: Services, *, dry_run: bool, without: Collection[str] = ()) -> list[tuple[str, int]]:
    """Remove what nothing needs; names, and the bytes that it frees. The caller holds the images' lock."""
    layout, wanted = services.layout, needed(services, without=without)
    unneeded = [path for path in _files_in(layout.layers) if path.stem not in wanted.layers]
    unneeded += [path for path in _files_in(layout.blobs) if path.name not in wanted.blobs]
    unneeded += [path for path in _files_in(layout.memory) if path.stem not in wanted.memory]
    unneeded += [path for path in _files_in(layout.templates) if path.stem not in wanted.memory]
    found = [
        (f"{path.parent.name.removesuffix('s')} {path.stem[:SHORT_ID]}", path.stat().st_blocks * 512)
        for path in unneeded
    ]
    found += _collect_folders(services, dry_run=dry_run)
    if not dry_run:
        # Records first: a record without its file would be worse than a file without a record.
        services.records.remove_layers({layer.id for layer in services.records.layers()} - wanted.layers)
        for path in unneeded:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            layout.templates.rmdir()
    return found


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _collect_folders(services: Services, *, dry_run: bool) -> list[tuple[str, int]]:
    """Temporary files and folders that no unfinished operation will come back to."""
    temporary = services.layout.temporary
    if not temporary.is_dir():
        return []
    unfinished = services.records.operations(unfinished=True)
    wanted = {operation.subject for operation in unfinished} | {o.request.get("id") for o in unfinished}
    found = []
    for folder in sorted(temporary.iterdir()):
        if folder.name in wanted or folder.name.partition("-")[2] in wanted:
            continue
        inside = [folder, *folder.rglob("*")]
        size = sum(path.stat().st_blocks * 512 for path in inside if path.is_file() and not path.is_symlink())
        found.append((f"unfinished {folder.name}", size))
        if not dry_run:
            _remove(folder)
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
