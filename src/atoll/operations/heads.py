"""Heads and layers: making the heads of a VM, and freezing them as layers with new heads on top.

A head is an empty overlay when it is made, so a disk has the same content with a new head on its old one as without.
That makes freezing safe to break off: once it has begun, going forward changes nothing that the guest can see.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec.structs import replace

from atoll.errors import from_os_error
from atoll.host import disks, files
from atoll.layout import Layout
from atoll.model.image import Layer
from atoll.model.spec import DiskSpec, VmSpec
from atoll.model.vm import Vm
from atoll.operations.services import Services


async def make(layout: Layout, vm_id: str, specs: Iterable[DiskSpec]) -> None:
    """Empty heads for the disks that are written. Raises `ProcessFailed`, also when the disk is full."""
    paths = layout.vm(vm_id)
    for disk in specs:
        if disk.blob is None:
            await disks.create_head(paths.head(disk), size=disk.size, empty=layout.empty_disks)


def remove(layout: Layout, vm: Vm | None, vm_id: str, specs: Iterable[DiskSpec]) -> None:
    """Delete heads, but for those that the VM's record has."""
    kept = {disk.head for spec in (vm.spec, vm.pending) if spec for disk in spec.disks} if vm is not None else set()
    for disk in specs:
        if disk.head and disk.head not in kept:
            layout.vm(vm_id).head(disk).unlink(missing_ok=True)


def split(disk: DiskSpec, heads: Mapping[str, str]) -> DiskSpec:
    """The disk with its head as a layer, and the new head that `heads` has for its name."""
    if disk.name not in heads or disk.head in ("", heads[disk.name]):
        return disk
    return replace(disk, layer=disk.head, head=heads[disk.name])


def split_spec(spec: VmSpec, heads: Mapping[str, str]) -> VmSpec:
    return replace(spec, disks=tuple(split(disk, heads) for disk in spec.disks))


def freeze(services: Services, vm: Vm, heads: Mapping[str, str]) -> Vm:
    """Freeze the files of the VM's old heads and record them as layers below the new ones. Idempotent.

    Raises `StorageFailed`. Whoever writes the disks must use the new heads by now.
    """
    layout, paths = services.layout, services.layout.vm(vm.id)
    frozen = [disk for disk in vm.spec.disks if split(disk, heads) != disk]
    if not frozen:
        return vm
    files.make_folder(layout.layers)
    layers = []
    for disk in frozen:
        path = layout.layer(disk.head)
        if not path.exists():
            files.freeze(paths.head(disk), path)
        layers.append(Layer(id=disk.head, virtual_size=disk.size, file_size=allocated(path), parent=disk.layer))
    files.sync_folder(paths.home)
    pending = None if vm.pending is None else split_spec(vm.pending, heads)
    vm = replace(vm, spec=split_spec(vm.spec, heads), pending=pending)
    services.records.freeze(vm, layers)
    return vm


def allocated(path: Path) -> int:
    """Bytes that the file takes on the disk. Raises `StorageFailed`."""
    try:
        return path.stat().st_blocks * 512
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
