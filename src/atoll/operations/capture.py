"""One instant of a VM: its disks cut, its memory saved. What snapshots, clones of running VMs and forks begin with."""

import asyncio
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import DisksChanged, Unsupported, from_os_error
from atoll.host import files
from atoll.layout import Layout
from atoll.model.names import new_id
from atoll.model.spec import VmSpec
from atoll.model.state import Phase, require
from atoll.model.vm import Vm
from atoll.operations import heads, observe
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.descriptors import add_nodes, hand_over_new, set_path, take_back
from atoll.operations.engine import Context
from atoll.operations.power import control, go_on
from atoll.operations.services import Services
from atoll.qemu import devices, jobs, mapped_ram
from atoll.qemu.monitor import Monitor
from atoll.qemu.plan import HandOver, head_nodes

LIVE = (Phase.RUNNING, Phase.PAUSED)
MEMORY_SET = "memory"
"""The name under which QEMU gets the file for its memory."""


class Cut(Struct, frozen=True, kw_only=True):
    """What to capture, and where to."""

    heads: dict[str, str]
    memory: Path | None = None
    """Save RAM and devices into this file, if the VM is live."""
    nvram: Path | None = None
    """Copy the UEFI variables into this file, if it has any."""


def _spec(vm: Vm, phase: Phase) -> VmSpec:
    return vm.pending or vm.spec if phase is Phase.STOPPED else vm.spec


def new_heads(services: Services, vm: Vm) -> dict[str, str]:
    """An id for the new head of each disk that is written, by the disk's name."""
    return {disk.name: new_id() for disk in _spec(vm, observe.phase_of(services, vm)).disks if disk.head}


def check(context: Context[Any], wanted: Mapping[str, str]) -> None:
    """Note the phase for the steps to come. Raises `WrongState`, `Busy` when the disks aren't those of `new_heads`."""
    services, vm = context.services, context.vm
    phase = observe.phase_of(services, vm)
    require(vm.name, phase, "snapshot")
    spec = _spec(vm, phase)
    if {disk.name for disk in spec.disks if disk.head} != set(wanted):
        raise DisksChanged(f"{vm.name}: its disks have just been changed", next_step="Try again.")
    if phase is Phase.STOPPED and vm.pending is not None:
        # What was set for the next start is what the VM is, now that it stands still.
        services.records.put_vm(replace(vm, spec=spec, pending=None))
    context.notes["phase"] = str(phase)
    context.notes["accelerator"] = vm.run.accelerator if vm.run is not None else ""


async def make_heads(context: Context[Any], wanted: Mapping[str, str]) -> None:
    """Empty heads beside the present ones."""
    vm = context.vm
    fresh = [split for disk in vm.spec.disks if (split := heads.split(disk, wanted)) != disk]
    await heads.make(context.services.layout, vm.id, fresh)


def remove_heads(context: Context[Any], wanted: Mapping[str, str]) -> None:
    """Those that nothing uses."""
    vm = context.services.records.vm(context.subject)
    specs = [heads.split(disk, wanted) for disk in vm.spec.disks] if vm is not None else []
    heads.remove(context.services.layout, vm, context.subject, specs)


async def cut(context: Context[Any], wanted: Cut) -> None:
    """Put the VM on its new heads at one instant, freeze the old ones, and begin to save its memory."""
    services, vm = context.services, context.vm
    files.make_folder(services.layout.temporary)
    if context.notes["phase"] in LIVE:
        await _cut_live(context, vm, wanted)
    else:
        _copy_variables(services.layout, vm, wanted)
        context.notes["at"] = time.time()
    if wanted.nvram is not None and wanted.nvram.exists():
        context.notes["nvram"] = files.sha256_of(wanted.nvram)
    await _freeze(services, vm, wanted.heads)


async def _freeze(services: Services, vm: Vm, wanted: Mapping[str, str]) -> None:
    # A layer that isn't recorded yet looks to `prune` like one that nothing needs.
    async with services.lease(IMAGES_LOCK, what="the images"):
        heads.freeze(services, vm, wanted)


def _copy_variables(layout: Layout, vm: Vm, wanted: Cut) -> None:
    source = layout.vm(vm.id).nvram
    if wanted.nvram is None or not source.exists():
        return
    try:
        shutil.copyfile(source, wanted.nvram)
    except OSError as error:
        raise from_os_error(error, f"copy {source}") from error


async def _cut_live(context: Context[Any], vm: Vm, wanted: Cut) -> None:
    runs = context.notes["phase"] == Phase.RUNNING
    async with control(context.services, vm) as monitor:
        await _add_heads(context.services.layout, monitor, vm, wanted.heads)
        live = False
        if wanted.memory is not None:
            live = await jobs.supports_live_memory(monitor)
            if not live and not runs:
                raise Unsupported(
                    f"{vm.name}: the memory of a paused VM can't be saved here",
                    "QEMU can't track its writes: this kernel has no userfaultfd, or /dev/userfaultfd is root's",
                    f"Let it go on first: `atoll resume {vm.name}`; or use --disk-only.",
                )
            await jobs.switch_on(monitor, jobs.LIVE_MEMORY if live else jobs.WHOLE_MEMORY)
            number = await hand_over_new(monitor, wanted.memory, name=MEMORY_SET)
        try:
            if runs:
                await monitor.execute("stop")
            context.notes["at"] = time.time()
            _copy_variables(context.services.layout, vm, wanted)
            await _switch_heads(monitor, vm, wanted.heads)
            if wanted.memory is not None:
                context.notes["saving"] = True
                await _begin_to_save(context, monitor, set_path(number), live=live)
        finally:
            if runs:
                await jobs.until_finalized(monitor)
                await monitor.execute("cont")


async def _add_heads(layout: Layout, monitor: Monitor, vm: Vm, wanted: Mapping[str, str]) -> None:
    """Let QEMU open the new heads, before the guest is stopped."""
    paths = layout.vm(vm.id)
    for disk in vm.spec.disks:
        fresh = heads.split(disk, wanted)
        if fresh == disk:
            continue

        def nodes(number: HandOver, fresh: Any = fresh) -> list[dict[str, Any]]:
            return head_nodes(fresh, paths.head(fresh), number, backing=None)

        await add_nodes(monitor, nodes)


async def _switch_heads(monitor: Monitor, vm: Vm, wanted: Mapping[str, str]) -> None:
    pairs = [(disk, fresh) for disk in vm.spec.disks if (fresh := heads.split(disk, wanted)) != disk]
    actions = [
        {
            "type": "blockdev-snapshot",
            "data": {"node": devices.head_node(disk), "overlay": devices.head_node(fresh)},
        }
        for disk, fresh in pairs
    ]
    if actions:
        await monitor.execute("transaction", {"actions": actions})


async def _begin_to_save(context: Context[Any], monitor: Monitor, where: str, *, live: bool) -> None:
    async with jobs.migration_events(monitor) as events:
        await monitor.execute("migrate", {"uri": f"file:{where}"})
        if live:
            await jobs.until_tracked(monitor)
        else:
            await jobs.until_ended(monitor, events, report=context.report, step="save the memory")


async def finish_cut(context: Context[Any], wanted: Mapping[str, str]) -> None:
    """After a failure: if QEMU is on the new heads, or may have been, record them; and let the guest go on."""
    services = context.services
    vm = services.records.vm(context.subject)
    if vm is None:
        return
    phase = observe.phase_of(services, vm)
    if any(heads.split(disk, wanted) != disk for disk in vm.spec.disks):
        if phase is Phase.STOPPED:
            begun = context.notes.get("phase") in LIVE or _some_frozen(services.layout, vm, wanted)
        else:
            begun = await _is_cut(services, vm, wanted)
        if begun:
            await _freeze(services, vm, wanted)
    if context.notes.get("phase") == Phase.RUNNING:
        await go_on(services, vm)


def _some_frozen(layout: Layout, vm: Vm, wanted: Mapping[str, str]) -> bool:
    return any(heads.split(disk, wanted) != disk and layout.layer(disk.head).exists() for disk in vm.spec.disks)


async def _is_cut(services: Services, vm: Vm, wanted: Mapping[str, str]) -> bool:
    """Whether QEMU writes to the new heads; if it doesn't, it closes them."""
    fresh = {devices.head_node(new) for disk in vm.spec.disks if (new := heads.split(disk, wanted)) != disk}
    async with control(services, vm) as monitor:
        blocks: list[dict[str, Any]] = await monitor.execute("query-block")
        used = {block["inserted"]["node-name"] for block in blocks if block.get("inserted")}
        if fresh & used:
            return True
        nodes: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {"flat": True})
        there = {node["node-name"] for node in nodes}
        for head in fresh:
            for node in (head, devices.file_node_name(head)):
                if node in there:
                    await monitor.execute("blockdev-del", {"node-name": node})
    return False


async def await_memory(context: Context[Any], file: Path) -> None:
    """Until the memory is written as a whole. Raises `EngineFailed` when QEMU can't, or has ended; `StorageFailed`."""
    async with control(context.services, context.vm) as monitor:
        async with jobs.migration_events(monitor) as events:
            await jobs.until_ended(monitor, events, report=context.report, step="save the memory")
        await jobs.switch_off(monitor)
        await take_back(monitor, name=MEMORY_SET)
    try:
        if await asyncio.to_thread(mapped_ram.is_mapped, file):
            await asyncio.to_thread(mapped_ram.write_bitmaps, file)
    except OSError as error:
        raise from_os_error(error, f"finish {file}") from error


async def drop_memory(context: Context[Any], file: Path) -> None:
    """After a failure: end the saving, and remove what there is of the file."""
    services = context.services
    vm = services.records.vm(context.subject)
    if vm is not None and observe.phase_of(services, vm) in LIVE:
        async with control(services, vm) as monitor:
            await jobs.cancel(monitor)
            await jobs.switch_off(monitor)
            await take_back(monitor, name=MEMORY_SET)
    file.unlink(missing_ok=True)
