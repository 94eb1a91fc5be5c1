"""restore

    step        do                                                                undo
    check       that the snapshot is there and its memory fits this host
    heads       an empty new head for each disk, on the snapshot's layers         remove those that aren't used
    set aside   halt the present QEMU, free its ports, move its sockets and       all of that back; the guest goes on
                its UEFI variables away
    launch      the snapshot's machine on the new heads, with its memory          kill it
    record      the VM is that machine now                                        (point of no return)
    go on       let its guest run; end the old QEMU, delete the old heads

Until the new machine stands, the present one is only halted: nothing of it is lost if the restore fails.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AtollError, NotFound, Unsupported
from atoll.host import facts, files, user_network
from atoll.model.names import find, new_id
from atoll.model.snapshot import Snapshot
from atoll.model.spec import NicSpec, PortSpec, VmSpec
from atoll.model.state import Phase
from atoll.model.vm import Run, Vm
from atoll.operations import guest_setup, heads, networks, observe, share, shares
from atoll.operations.boot import Incoming, boot, kill_strays
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.power import control, go_on
from atoll.operations.services import Report, Services
from atoll.operations.start import drop_removed_disks
from atoll.operations.template import memory_path


class RestoreRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    snapshot_id: str
    heads: dict[str, str]
    disk_only: bool = False
    """Leave its memory; a VM that runs is booted."""


def find_snapshot(services: Services, vm: Vm, reference: str) -> Snapshot:
    """One of the VM's own, by name, id or unique prefix. Raises `NotFound`, `InvalidInput`."""
    try:
        return find(reference, services.records.snapshots(vm.id), "snapshot")
    except NotFound as error:
        raise NotFound(
            f"{vm.name} has no snapshot '{reference}'",
            next_step=error.next_step if "mean" in error.next_step else f"`atoll history {vm.name}` lists them.",
        ) from None


async def restore(
    vm: Vm, node: Snapshot, *, services: Services, report: Report | None = None, disk_only: bool = False
) -> None:
    """Make the VM what it was. One that has memory goes on from there; else, and with `disk_only`, a VM that runs is
    booted anew.

    The present is lost: take a snapshot first to keep it. Raises `Unsupported` when the memory is of another
    accelerator, `EngineFailed`, `StorageFailed`; the VM is then as it was.
    """
    request = RestoreRequest(
        vm_id=vm.id,
        snapshot_id=node.id,
        heads={disk.name: new_id() for disk in node.spec.disks if disk.layer},
        disk_only=disk_only,
    )
    await perform(RESTORE, request, services=services, subject=vm.id, subject_name=vm.name, report=report)
    await share.mount_all(services, services.vm(vm.id), others=bool(node.spec.shares))


def _node(context: Context[RestoreRequest]) -> Snapshot:
    node = context.services.records.snapshot(context.request.snapshot_id)
    if node is None:
        raise NotFound(f"{context.vm.name}: the snapshot is gone", "another command removed it")
    nics = networks.still_here(context.services, node.spec.nics)
    node = replace(node, spec=replace(node.spec, nics=nics))
    return replace(node, memory=None) if context.request.disk_only else node


def restored_spec(vm: Vm, node: Snapshot, new_heads: dict[str, str]) -> VmSpec:
    """The snapshot's machine on new heads; what is published and shared, and which rules hold for cards that it has,
    are the host's business, so they stay as they are: the past opens no door that was shut since.
    """
    now = {nic.name: nic for nic in vm.spec.nics}
    nics = []
    for nic in node.spec.nics:
        today = now.get(nic.name)
        if today is not None and today.network == nic.network:
            nic = replace(nic, groups=today.groups, limit=today.limit)
        nics.append(replace(nic, ports=() if today is None else today.ports))
    disks = tuple(replace(disk, head=new_heads.get(disk.name, "")) for disk in node.spec.disks)
    known = node.spec.shares if node.memory is not None else ()
    folders = shares.with_known_ports(vm.spec.shares, known)
    return replace(node.spec, nics=tuple(nics), disks=disks, shares=folders)


async def _check(context: Context[RestoreRequest]) -> None:
    services, vm, node = context.services, context.vm, _node(context)
    phase = observe.phase_of(services, vm)
    context.notes["phase"] = str(phase)
    if node.memory is None:
        return
    caps = await services.capabilities(node.spec.arch)
    accelerator = await services.accelerator(node.spec.accelerator, caps)
    if accelerator != node.memory.accelerator:
        raise Unsupported(
            f"{vm.name}: '{node.name}' can't go on here",
            f"its memory was saved under {node.memory.accelerator}, and guests run under {accelerator} now",
            f"Restore the disks only: `atoll restore --disk-only {vm.name} {node.name}`.",
        )


async def _make_heads(context: Context[RestoreRequest]) -> None:
    spec = restored_spec(context.vm, _node(context), context.request.heads)
    await heads.make(context.services.layout, context.subject, spec.disks)


async def _remove_heads(context: Context[RestoreRequest]) -> None:
    vm, node = (
        context.services.records.vm(context.subject),
        context.services.records.snapshot(context.request.snapshot_id),
    )
    if vm is not None and node is not None:
        spec = restored_spec(vm, node, context.request.heads)
        heads.remove(context.services.layout, vm, vm.id, spec.disks)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.before")


async def _set_aside(context: Context[RestoreRequest]) -> None:
    services, vm, node = context.services, context.vm, _node(context)
    paths = services.layout.vm(vm.id)
    if observe.phase_of(services, vm) not in (Phase.STOPPED, Phase.SUSPENDED):
        async with control(services, vm) as monitor:
            if context.notes["phase"] == Phase.RUNNING:
                await monitor.execute("stop")
        for nic, port in _published(vm):
            user_network.unpublish(paths.network_control(nic.name), port, restrict=nic.restrict)
        paths.run.rename(_aside(paths.run))
    if paths.nvram.exists() and not _aside(paths.nvram).exists():
        paths.nvram.rename(_aside(paths.nvram))
    if node.nvram is not None:
        files.write_atomically(paths.nvram, services.layout.blob(node.nvram).read_bytes())


def _published(vm: Vm) -> Iterator[tuple[NicSpec, PortSpec]]:
    """Those of a network are its uplink's, and lead to the same address afterwards."""
    return ((nic, port) for nic in vm.spec.nics for port in nic.ports if nic.network is None)


async def _take_back(context: Context[RestoreRequest]) -> None:
    services = context.services
    vm = services.records.vm(context.subject)
    if vm is None:
        return
    paths = services.layout.vm(vm.id)
    if _aside(paths.nvram).exists():
        _aside(paths.nvram).rename(paths.nvram)
    if _aside(paths.run).exists():
        shutil.rmtree(paths.run, ignore_errors=True)
        _aside(paths.run).rename(paths.run)
    if vm.run is None or not facts.is_alive(vm.run):
        return
    for nic, port in _published(vm):
        with contextlib.suppress(AtollError):
            user_network.publish(paths.network_control(nic.name), port, restrict=nic.restrict)
    if context.notes.get("phase") == Phase.RUNNING:
        await go_on(services, vm)


async def _launch(context: Context[RestoreRequest]) -> None:
    services, vm, node = context.services, context.vm, _node(context)
    if node.memory is None and context.notes["phase"] in (Phase.STOPPED, Phase.SUSPENDED):
        return
    await kill_strays(services, vm)
    incoming = Incoming(memory_path(services.layout, node.memory)) if node.memory is not None else None
    spec = restored_spec(vm, node, context.request.heads)
    # A seed that was attached at that instant is there again: the machine has to be the same.
    # Memory can be loaded only with the ports that it knows; what was shared since gets its own afterwards.
    known = replace(spec, shares=node.spec.shares) if incoming is not None else spec
    run = await boot(services, replace(vm, seeded=node.seeded), known, report=context.report, incoming=incoming)
    if incoming is not None:
        await share.plug_missing(services, vm, there=known.shares, wanted=spec.shares)
    context.notes["run"] = msgspec.to_builtins(run)


async def _kill(context: Context[RestoreRequest]) -> None:
    vm = context.services.records.vm(context.subject)
    if vm is not None:
        await kill_strays(context.services, vm)


async def _record(context: Context[RestoreRequest]) -> None:
    services, vm, node = context.services, context.vm, _node(context)
    run = msgspec.convert(context.notes["run"], Run) if "run" in context.notes else None
    if vm.suspended is not None:
        context.notes["dropped memory"] = vm.suspended.id
    spec = restored_spec(vm, node, context.request.heads)
    restored = replace(
        vm, spec=spec, pending=None, run=run, snapshot=node.id, seeded=node.seeded, suspended=None, last_exit=None
    )
    services.records.put_vm(restored)
    services.records.add_event("vm.restored", vm_id=vm.id, name=vm.name, data={"snapshot": node.name, "id": node.id})


async def _go_on(context: Context[RestoreRequest]) -> None:
    services, vm = context.services, context.vm
    node = services.records.snapshot(context.request.snapshot_id)
    memory = None if node is None or context.request.disk_only else node.memory
    if memory is not None and memory.running:
        await go_on(services, vm)
        services.later(guest_setup.settled(services, vm))
    # The old QEMU is one that isn't recorded any more.
    await kill_strays(services, vm)
    paths = services.layout.vm(vm.id)
    drop_removed_disks(paths, vm.spec)
    shutil.rmtree(_aside(paths.run), ignore_errors=True)
    _aside(paths.nvram).unlink(missing_ok=True)
    if "dropped memory" in context.notes:
        services.layout.memory_file(context.notes["dropped memory"]).unlink(missing_ok=True)


RESTORE = Verb(
    name="restore",
    request=RestoreRequest,
    steps=(
        Step("check", _check),
        Step("heads", _make_heads, _remove_heads),
        Step("set aside", _set_aside, _take_back),
        Step("launch", _launch, _kill),
        Step("record", _record, final=True),
        Step("go on", _go_on),
    ),
)
