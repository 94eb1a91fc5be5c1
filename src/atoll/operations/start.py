"""start

step      do                                                                      undo
check     that it is stopped
launch    plan, open, bind, spawn QEMU, greet it by QMP, load suspended memory    kill the QEMU that has this VM's UUID
record    its process, and the spec that it runs with                             (point of no return)
go on     a suspended one: let its guest run, and drop the memory file
"""

import contextlib

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AtollError
from atoll.layout import VmPaths
from atoll.model.snapshot import Memory
from atoll.model.spec import VmSpec
from atoll.model.state import require
from atoll.model.vm import Run, Vm
from atoll.operations import bells, observe
from atoll.operations.boot import Incoming, boot, kill_strays
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.power import go_on
from atoll.operations.services import Report, Services
from atoll.operations.template import drop_under_pressure, shared_memory


class StartRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    hold: bool = False
    """A guest that goes on from memory stands still until it is told to."""


async def start(vm: Vm, *, services: Services, report: Report | None = None, hold: bool = False) -> None:
    """Start a stopped VM; returns with the guest running, unless one with memory is to be held.

    Raises `WrongState`, `EngineFailed`, `StorageFailed`.
    """
    request = StartRequest(vm_id=vm.id, hold=hold)
    await perform(START, request, services=services, subject=vm.id, subject_name=vm.name, report=report)
    if vm.spec.shares or vm.pending is not None:
        from atoll.operations.share import mount_all

        await mount_all(services, services.vm(vm.id))


async def _check_stopped(context: Context[StartRequest]) -> None:
    """A step of its own, without undo: refusing to start a VM that runs must not end it."""
    require(context.vm.name, observe.phase_of(context.services, context.vm), "start")


async def _launch(context: Context[StartRequest]) -> None:
    services, vm = context.services, context.vm
    spec = _wanted(vm)
    async with bells.taken(services.layout.vm(vm.id), spec.nics) as kept:
        # A start that was killed before it was recorded may have left one.
        await kill_strays(services, vm, kept=bells.names_of(kept.descriptors))
        drop_under_pressure(services)
        incoming = None
        if vm.suspended is not None:
            context.notes["suspended"] = msgspec.to_builtins(vm.suspended)
            incoming = await _memory(services, vm.suspended)
        run = await boot(services, vm, spec, report=context.report, incoming=incoming, kept=kept)
    context.notes["run"] = msgspec.to_builtins(run)


async def _memory(services: Services, memory: Memory) -> Incoming:
    """One's own memory is loaded; what others go on from as well is shared until it is written."""
    if memory.shared:
        return await shared_memory(services, memory)
    return Incoming(services.layout.memory_file(memory.id))


def _wanted(vm: Vm) -> VmSpec:
    """A suspended machine goes on as it was; what was set meanwhile waits for a real start."""
    spec = vm.pending or vm.spec
    if vm.suspended is not None:
        return vm.spec
    if not spec.shares:
        return spec
    from atoll.operations.shares import at_boot

    return at_boot(spec)


async def _kill(context: Context[StartRequest]) -> None:
    with contextlib.suppress(AtollError):
        await kill_strays(context.services, context.vm)


async def _record(context: Context[StartRequest]) -> None:
    services, vm = context.services, context.vm
    run, spec = msgspec.convert(context.notes["run"], Run), _wanted(vm)
    pending = vm.pending if vm.suspended is not None else None
    services.records.put_vm(replace(vm, spec=spec, pending=pending, run=run, last_exit=None, suspended=None))
    if pending is None:
        drop_removed_disks(services.layout.vm(vm.id), spec)
    services.records.add_event("vm.started", vm_id=vm.id, name=vm.name, data={"accelerator": run.accelerator})


async def _go_on(context: Context[StartRequest]) -> None:
    suspended = context.notes.get("suspended")
    if suspended is None:
        return
    memory = msgspec.convert(suspended, Memory)
    if memory.running and not context.request.hold:
        await go_on(context.services, context.vm)
        if not memory.shared:
            # What talks to guests takes 9 ms to import, which most starts don't need.
            from atoll.operations import guest_setup

            context.services.later(guest_setup.settled(context.services, context.vm))
    if not memory.shared:
        context.services.layout.memory_file(memory.id).unlink(missing_ok=True)


def drop_removed_disks(paths: VmPaths, spec: VmSpec) -> None:
    """Delete the heads that the machine doesn't have: of disks removed while the guest held them, and of the past."""
    kept = {paths.head(disk) for disk in spec.disks}
    for path in paths.home.glob("*.qcow2"):
        if path not in kept:
            path.unlink(missing_ok=True)


START = Verb(
    name="start",
    request=StartRequest,
    durable=False,
    steps=(
        Step("check", _check_stopped),
        Step("launch", _launch, _kill),
        Step("record", _record, final=True),
        Step("go on", _go_on),
    ),
)
