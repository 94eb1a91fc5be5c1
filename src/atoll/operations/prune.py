"""prune: what can go without anybody missing it.

Unneeded layers, plain files, memory and unfinished folders, and templates, which are made again when they are needed.
On demand also images that nothing came from, and downloads that are whole. One lock, and nothing to undo: whoever dies
on the way leaves less to prune.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from atoll.errors import from_os_error
from atoll.host import files
from atoll.model.image import Image
from atoll.model.names import SHORT_ID
from atoll.operations.collect import add_those_below, collect, needed_by, size_of
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.services import Services


async def prune(*, services: Services, every: bool = False, dry_run: bool = False) -> list[tuple[str, int]]:
    """Remove it, or only tell; names and the bytes that each frees. Raises `Busy`, `StorageFailed`, `RecordsFailed`."""
    try:
        async with services.lease(IMAGES_LOCK, what="the images"):
            unused = unused_images(services) if every else []
            found = remove_images(services, unused, dry_run=dry_run)
            without = {image.id for image in unused}
            found += collect(services, dry_run=dry_run, without=without, templates=True)
        return found + (list(_downloads(services.layout.downloads, dry_run=dry_run)) if every else [])
    except OSError as error:
        raise from_os_error(error, "remove what nothing needs") from error


def unused_images(services: Services) -> list[Image]:
    """The images of which no VM has anything."""
    return [image for image in services.records.images() if not users_of_image(services, image)]


def users_of_image(services: Services, image: Image) -> list[str]:
    """The names of the VMs that have something of the image's: now, from the next start on, or in their history; also
    far below their disks.
    """
    records = services.records
    names, specs = {}, {}
    for vm in records.vms():
        names[vm.id], specs[vm.id] = vm.name, [spec for spec in (vm.spec, vm.pending) if spec]
    for node in records.snapshots():
        names.setdefault(node.vm_id, node.vm_name)
        specs.setdefault(node.vm_id, []).append(node.spec)
    below = {layer.id: layer.parent for layer in records.layers()}
    found = []
    for vm_id, those in specs.items():
        needed = needed_by(those)
        add_those_below(needed.layers, below)
        if needed.layers & set(image.layer_ids) or needed.blobs & set(image.blob_ids):
            found.append(names[vm_id])
    return found


def remove_images(services: Services, images: Iterable[Image], *, dry_run: bool) -> list[tuple[str, int]]:
    """Their records only; the files are `collect`'s, which tells their bytes."""
    removed = []
    for image in images:
        removed.append((f"image {image.name}", 0))
        if not dry_run:
            services.records.remove_image(image.id)
            services.records.add_event("image.removed", name=image.name, data={"image": image.id})
    return removed


def _downloads(folder: Path, *, dry_run: bool) -> Iterator[tuple[str, int]]:
    """Those that are whole and that nobody is reading. One that broke off stays: it goes on from there."""
    from atoll.images.download import is_complete

    for part in sorted(folder.glob("*.part")) if folder.is_dir() else ():
        with files.locked(part.with_suffix(".lock"), wait=False) as ours:
            if ours and is_complete(part):
                size = size_of(part) + size_of(part.with_suffix(".json"))
                if not dry_run:
                    for path in (part, part.with_suffix(".json")):
                        path.unlink(missing_ok=True)
                yield f"download {part.stem[:SHORT_ID]}", size
