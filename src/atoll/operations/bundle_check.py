"""Whether a manifest that comes from elsewhere can be believed. Pure.

Ids become names of files: each is held to what Atoll itself would have written, and so is the machine.
"""

import re

from atoll.errors import AtollError, ImageRefused
from atoll.images.source import DAMAGED
from atoll.model.bundle import BundledLayer, Manifest
from atoll.model.names import check_snapshot_name, check_vm_name, shown
from atoll.model.spec import DiskSpec
from atoll.operations.check_spec import check_spec
from atoll.operations.collect import needed_by

_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
LARGEST_FILE = 1 << 50
"""Bytes. What a file system may take, and far from what a number in a manifest may say."""


def refused(why: str, next_step: str = "") -> ImageRefused:
    return ImageRefused("the bundle can't be imported", why, next_step)


def check_manifest(manifest: Manifest) -> None:
    """Raises `ImageRefused`."""
    node = manifest.snapshot
    try:
        check_vm_name(node.vm_name)
        check_snapshot_name(node.name)
        check_spec(node.spec)
    except AtollError as error:
        raise refused(f"its machine can't be: {error.what}" + (f" ({error.why})" if error.why else "")) from error
    for disk in node.spec.disks:
        _check_disk(disk)
    _check_layers(manifest)
    _check_files(manifest)


def _require(holds: object, why: str) -> None:
    if not holds:
        raise refused(f"its manifest is wrong: {why}", DAMAGED)


def _check_disk(disk: DiskSpec) -> None:
    _require((disk.layer is None) is not (disk.blob is None), f"the disk '{disk.name}' has no content, or two")
    _require(not disk.head, f"the disk '{disk.name}' has a head")


def _check_layers(manifest: Manifest) -> None:
    known: dict[str, BundledLayer] = {}
    for each in manifest.layers:
        layer = each.layer
        _require(_ID.fullmatch(layer.id) and layer.id not in known, f"the layer {shown(layer.id)}")
        _require(_SHA256.fullmatch(layer.sha256), f"the checksum {shown(layer.sha256)}")
        _require(all(_ID.fullmatch(merged) for merged in layer.merged), "what a layer was merged from")
        _require(0 <= each.size <= LARGEST_FILE, f"the size of the layer {layer.id}")
        below = known.get(layer.parent) if layer.parent is not None else None
        _require(layer.parent is None or below is not None, f"nothing is below the layer {layer.id}")
        _require(each.included or below is None or not below.included, "a layer of its base stands on one of its own")
        known[layer.id] = each
    wanted: set[str] = set()
    for disk in manifest.snapshot.spec.disks:
        if disk.layer is None:
            continue
        _require(disk.layer in known, f"the disk '{disk.name}' has no layer")
        _require(known[disk.layer].layer.virtual_size <= disk.size, f"the disk '{disk.name}' is smaller than its layer")
        layer_id: str | None = disk.layer
        while layer_id is not None:
            wanted.add(layer_id)
            layer_id = known[layer_id].layer.parent
    _require(wanted == set(known), "it has layers that no disk needs")


def _check_files(manifest: Manifest) -> None:
    node, memory = manifest.snapshot, manifest.memory
    blobs = needed_by([node.spec]).blobs | ({node.nvram} if node.nvram else set())
    found = [blob.sha256 for blob in manifest.blobs]
    _require(all(_SHA256.fullmatch(blob) for blob in (*found, *blobs)), "the checksum of a file")
    _require(len(found) == len(set(found)) and set(found) == blobs, "its files aren't those that the machine needs")
    _require(all(0 <= blob.size <= LARGEST_FILE for blob in manifest.blobs), "the size of a file")
    _require((memory is None) is (node.memory is None), "its memory is missing, or one too many")
    if memory is not None:
        _require(_SHA256.fullmatch(memory.sha256), "the checksum of its memory")
        _require(0 < memory.size <= LARGEST_FILE and 0 <= memory.stored <= LARGEST_FILE, "the size of its memory")
