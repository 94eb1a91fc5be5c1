"""disk add, disk rm, disk resize

add      check ─ file (undo: remove it) ─ attach, if it runs (undo: detach) ─ record  (point of no return)
rm       check ─ detach, if it runs (undo: attach) ─ record (point of no return) ─ delete
resize   check ─ grow the file or the open node (point of no return: disks only grow) ─ record
"""

import contextlib
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, AtollError, InvalidInput, NotFound
from atoll.host import disks
from atoll.host.sandbox import allow_file
from atoll.model.requests import DiskRequest
from atoll.model.spec import DiskSpec, VmSpec
from atoll.model.state import Phase, require
from atoll.model.units import format_size
from atoll.model.vm import Change, Vm
from atoll.operations import hotplug, limits, observe, resolve_disks
from atoll.operations.create import IMAGES_LOCK, find_image
from atoll.operations.descriptors import add_nodes
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.power import control
from atoll.operations.relink import close_nodes, nodes_below
from atoll.operations.services import Services
from atoll.qemu import devices
from atoll.qemu.plan import disk_nodes, layer_chain


class AddRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    disk: DiskSpec


class RemoveDiskRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    disk: DiskSpec


class ResizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    name: str
    size: int


async def add_disk(vm: Vm, request: DiskRequest, *, services: Services) -> tuple[DiskSpec, Change]:
    """A further disk, live where QEMU can. Raises `InvalidInput`, `NotFound` (image), `StorageFailed`."""
    image = find_image(request.image, services.records.images()) if request.image is not None else None
    (disk,) = resolve_disks.with_heads([resolve_disks.further_disk(request, _all_disks(vm), image)])
    for spec in (vm.spec, vm.pending or vm.spec):
        devices.check_disks(_with_disks(spec, (*spec.disks, disk), {}))
    wanted = AddRequest(vm_id=vm.id, disk=disk)
    try:
        context = await perform(ADD, wanted, services=services, subject=vm.id, subject_name=vm.name)
    except AlreadyExists:
        if request.name:
            raise
        # Another process took the name that was made up; it is recorded now, so another one is made up.
        return await add_disk(services.vm(vm.id), request, services=services)
    return disk, _change(disk.name, format_size(disk.size), str(context.notes.get("later", "")))


async def remove_disk(vm: Vm, name: str, *, services: Services) -> Change:
    """Take a disk away and delete its content, live where the guest lets go. Raises `NotFound`."""
    request = RemoveDiskRequest(vm_id=vm.id, disk=_find(vm.pending or vm.spec, name, vm.name))
    context = await perform(REMOVE, request, services=services, subject=vm.id, subject_name=vm.name)
    return _change(name, "removed", str(context.notes.get("later", "")))


async def resize_disk(vm: Vm, name: str, size: str | int, *, services: Services) -> Change:
    """Grow a disk to `size`, live. Raises `InvalidInput` for a smaller one."""
    wanted = check_growth(vm, name, size)
    request = ResizeRequest(vm_id=vm.id, name=name, size=wanted)
    await perform(RESIZE, request, services=services, subject=vm.id, subject_name=vm.name)
    return _change(f"disk {name}", format_size(wanted), "")


def check_growth(vm: Vm, name: str, size: str | int) -> int:
    """Bytes. Raises `NotFound`, or `InvalidInput` for a disk that can't have that size."""
    wanted = resolve_disks.check_disk_size(size)
    _find(vm.pending or vm.spec, name, vm.name)
    disk = max((disk for disk in _all_disks(vm) if disk.name == name), key=lambda disk: disk.size)
    if wanted < disk.size or disk.blob is not None:
        raise InvalidInput(
            f"{vm.name}: the disk '{name}' can't have {format_size(wanted)}",
            "it is read-only" if disk.blob else f"it has {format_size(disk.size)}, and disks only grow",
        )
    return wanted


def _change(name: str, value: str, later: str) -> Change:
    return Change(name=name, value=value, when="next-start" if later else "now", why=later)


def _all_disks(vm: Vm) -> tuple[DiskSpec, ...]:
    """Those of the next start, and those that a running VM keeps until then."""
    later = vm.pending.disks if vm.pending is not None else ()
    return (*vm.spec.disks, *(disk for disk in later if disk not in vm.spec.disks))


def _find(spec: VmSpec, name: str, vm_name: str) -> DiskSpec:
    for disk in spec.disks:
        if disk.name == name:
            return disk
    has = ", ".join(disk.name for disk in spec.disks) or "none"
    raise NotFound(f"{vm_name} has no disk '{name}'", f"its disks: {has}")


def _runs(context: Context[Any]) -> bool:
    return observe.phase_of(context.services, context.vm) in (Phase.RUNNING, Phase.PAUSED)


def _with_disks(spec: VmSpec, changed: tuple[DiskSpec, ...], plugged: dict[str, str]) -> VmSpec:
    spec = replace(spec, disks=changed, addresses=spec.addresses | plugged)
    return replace(spec, addresses=devices.assign_addresses(spec))


def _put(context: Context[Any], changed: tuple[DiskSpec, ...], *, now: bool) -> None:
    """Record the disks: for the running machine and the next start, or for the next start only.

    A disk that was plugged in keeps its port: the machine is the same after a restart, and when its memory is restored.
    """
    vm, port = context.vm, context.notes.get("port")
    plugged = {devices.disk_id(context.request.disk.name): port} if now and port else {}
    later = None if vm.pending is None and now else _with_disks(vm.pending or vm.spec, changed, plugged)
    spec = _with_disks(vm.spec, changed, plugged) if now else vm.spec
    context.services.records.put_vm(replace(vm, spec=spec, pending=later))


# add


async def _check_name_free(context: Context[AddRequest]) -> None:
    """A step of its own, without undo: the file of a disk that is there is neither replaced nor removed."""
    require(context.vm.name, observe.phase_of(context.services, context.vm), "disk")
    name = context.request.disk.name
    if any(disk.name == name for disk in _all_disks(context.vm)):
        raise AlreadyExists(f"{context.vm.name}: there is a disk '{name}' already", next_step="Choose another name.")


async def _make_file(context: Context[AddRequest]) -> None:
    layout, disk = context.services.layout, context.request.disk
    if disk.blob is not None:
        return
    async with context.services.lease(IMAGES_LOCK, what="the images"):
        await disks.create_head(layout.vm(context.subject).head(disk), size=disk.size, empty=layout.empty_disks)


async def _remove_file(context: Context[AddRequest]) -> None:
    if context.request.disk.blob is None:
        context.services.layout.vm(context.subject).head(context.request.disk).unlink(missing_ok=True)


async def _attach(context: Context[AddRequest] | Context[RemoveDiskRequest]) -> None:
    disk = context.request.disk
    if not _runs(context):
        return
    if disk.bus != "virtio":
        context.notes["later"] = f"disks on {disk.bus} can't be added while it runs"
        return
    async with control(context.services, context.vm) as monitor:
        port = await hotplug.free_port(monitor)
        if port is None:
            context.notes["later"] = f"its {devices.HOTPLUG_PORTS} hot-plug ports are used"
            return
        context.notes["port"] = port
        await _let_grow(context.vm, disk.size)
        layout, layers = context.services.layout, {layer.id: layer for layer in context.services.records.layers()}
        await add_nodes(
            monitor,
            lambda number: disk_nodes(disk, layout=layout, vm_id=context.subject, layers=layers, hand_over=number),
        )
        for device in devices.disk_devices(context.vm.spec, disk, boot_index=None, bus=port):
            await monitor.execute("device_add", device)
        await limits.hold_back_disks(monitor, context.vm.spec.limits)


async def _let_grow(vm: Vm, size: int) -> None:
    if vm.run is not None:
        await allow_file(vm.id, vm.run.pid, size)


async def _detach(context: Context[AddRequest] | Context[RemoveDiskRequest]) -> None:
    """Unplug the device, then close its nodes, top first. What isn't there is fine."""
    if not _runs(context):
        return
    disk = context.request.disk
    async with control(context.services, context.vm) as monitor:
        later = await hotplug.unplug(monitor, devices.disk_id(disk.name))
        if later:
            context.notes["later"] = later
            return
        head, layers = devices.head_node(disk), {layer.id: layer for layer in context.services.records.layers()}
        # A plugging that was broken off has no head yet; a disk whose layers were merged has others than are recorded.
        recorded = [devices.node_name(disk.name, layer) for layer in reversed(layer_chain(disk.layer, layers))]
        await close_nodes(monitor, [head, *dict.fromkeys([*await nodes_below(monitor, head), *recorded])])


async def _record_added(context: Context[AddRequest]) -> None:
    vm, disk = context.vm, context.request.disk
    others = tuple(other for other in (vm.pending or vm.spec).disks if other.name != disk.name)
    _put(context, (*others, disk), now=not context.notes.get("later"))
    context.services.records.add_event("vm.disk-added", vm_id=vm.id, name=vm.name, data={"disk": disk.name})


# rm


async def _check_it_may_go(context: Context[RemoveDiskRequest]) -> None:
    require(context.vm.name, observe.phase_of(context.services, context.vm), "disk")


async def _attach_again(context: Context[RemoveDiskRequest]) -> None:
    with contextlib.suppress(AtollError):
        await _attach(context)


async def _record_removed(context: Context[RemoveDiskRequest]) -> None:
    vm, gone = context.vm, context.request.disk.name
    changed = tuple(disk for disk in (vm.pending or vm.spec).disks if disk.name != gone)
    _put(context, changed, now=not context.notes.get("later"))
    context.services.records.add_event("vm.disk-removed", vm_id=vm.id, name=vm.name, data={"disk": gone})


async def _delete_file(context: Context[RemoveDiskRequest]) -> None:
    """A disk that goes at the next start keeps its file until then (`operations/start.py`)."""
    if not context.notes.get("later") and context.request.disk.blob is None:
        context.services.layout.vm(context.subject).head(context.request.disk).unlink(missing_ok=True)


# resize


async def _check_it_grows(context: Context[ResizeRequest]) -> None:
    """Another command may have grown it, or taken it away, since this one looked."""
    require(context.vm.name, observe.phase_of(context.services, context.vm), "disk")
    check_growth(context.vm, context.request.name, context.request.size)


async def _grow(context: Context[ResizeRequest]) -> None:
    vm, request = context.vm, context.request
    if not _runs(context):
        disk = _find(vm.pending or vm.spec, request.name, vm.name)
        await disks.resize(context.services.layout.vm(vm.id).head(disk), request.size)
        return
    disk = _find(vm.spec, request.name, vm.name)
    await _let_grow(vm, request.size)
    async with control(context.services, vm) as monitor:
        await monitor.execute("block_resize", {"node-name": devices.head_node(disk), "size": request.size})


async def _record_size(context: Context[ResizeRequest]) -> None:
    vm, request = context.vm, context.request

    def grown(spec: VmSpec) -> VmSpec:
        sized = (replace(disk, size=request.size) if disk.name == request.name else disk for disk in spec.disks)
        return replace(spec, disks=tuple(sized))

    pending = None if vm.pending is None else grown(vm.pending)
    context.services.records.put_vm(replace(vm, spec=grown(vm.spec), pending=pending))


ADD = Verb(
    name="disk add",
    request=AddRequest,
    steps=(
        Step("check", _check_name_free),
        Step("file", _make_file, _remove_file),
        Step("attach", _attach, _detach),
        Step("record", _record_added, final=True),
    ),
)
REMOVE = Verb(
    name="disk rm",
    request=RemoveDiskRequest,
    steps=(
        Step("check", _check_it_may_go),
        Step("detach", _detach, _attach_again),
        Step("record", _record_removed, final=True),
        Step("delete", _delete_file),
    ),
)
RESIZE = Verb(
    name="disk resize",
    request=ResizeRequest,
    steps=(Step("check", _check_it_grows), Step("grow", _grow, final=True), Step("record", _record_size)),
)
