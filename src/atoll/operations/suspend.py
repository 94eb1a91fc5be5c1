"""suspend

    step      do                                                    undo
    check     that it is live
    save      halt the guest, write its memory                      cancel that, remove the file, let the guest go on
    record    it goes on from that memory at its next start         (point of no return)
    end       QEMU, which has written nothing since

The heads stay as they are: nothing writes them until the memory is loaded again.
"""

import time
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import WrongState
from atoll.host import facts, files
from atoll.model.names import new_id
from atoll.model.snapshot import Memory
from atoll.model.state import Phase, require
from atoll.model.supervision import EndReason, SuspendReason
from atoll.model.vm import Exit, Vm
from atoll.operations import bells, capture, network_ports, observe
from atoll.operations.boot import engines_of, kill_strays
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.descriptors import hand_over_new, set_path, take_back
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.power import control, go_on
from atoll.operations.services import Report, Services
from atoll.operations.snapshot import adopt
from atoll.qemu import jobs


class SuspendRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    id: str
    """Of the memory."""
    reason: SuspendReason = "asked"


async def suspend(vm: Vm, *, services: Services, reason: SuspendReason = "asked", report: Report | None = None) -> None:
    """Write a live VM's memory to the disk and end its process. Fine if it is suspended. Raises `WrongState`."""
    if vm.suspended is not None and vm.run is None:
        return
    request = SuspendRequest(vm_id=vm.id, id=new_id(), reason=reason)
    await perform(SUSPEND, request, services=services, subject=vm.id, subject_name=vm.name, report=report)


def has_callers(vm: Vm, connected: set[int]) -> bool:
    """Whether connections to its published ports are among these of the computer's."""
    return any(port.protocol == "tcp" and port.host_port in connected for nic in vm.spec.nics for port in nic.ports)


def drop(services: Services, vm: Vm) -> Vm:
    """Forget what a suspended VM would go on from."""
    if vm.suspended is None:
        return vm
    memory = vm.suspended
    vm = replace(vm, suspended=None)
    services.records.put_vm(vm)
    if not memory.shared:
        services.layout.memory_file(memory.id).unlink(missing_ok=True)
    return vm


def _file(context: Context[SuspendRequest]) -> Path:
    return context.services.layout.temporary / f"memory-{context.request.id}"


async def _check(context: Context[SuspendRequest]) -> None:
    vm = context.vm
    phase = observe.phase_of(context.services, vm)
    require(vm.name, phase, "suspend")
    assert vm.run is not None
    context.notes["phase"] = str(phase)
    context.notes["accelerator"] = vm.run.accelerator


async def _save(context: Context[SuspendRequest]) -> None:
    file = _file(context)
    files.make_folder(file.parent)
    async with control(context.services, context.vm) as monitor:
        await take_back(monitor, name=capture.MEMORY_SET)
        number = await hand_over_new(monitor, file, name=capture.MEMORY_SET)
        async with jobs.capabilities(monitor, jobs.WHOLE_MEMORY), jobs.migration_events(monitor) as events:
            await monitor.execute("stop")
            await monitor.execute("migrate", {"uri": f"file:{set_path(number)}"})
            await jobs.until_ended(monitor, events, report=context.report, step="save the memory")
    if context.request.reason == "idle" and has_callers(context.vm, facts.connected_ports()):
        raise WrongState(f"{context.vm.name}: it isn't idle any more", "somebody has connected to it")


async def _go_on(context: Context[SuspendRequest]) -> None:
    await capture.drop_memory(context, _file(context))
    vm = context.services.records.vm(context.subject)
    if vm is not None and context.notes.get("phase") == Phase.RUNNING:
        await go_on(context.services, vm)


async def _record(context: Context[SuspendRequest]) -> None:
    services, vm, request = context.services, context.vm, context.request
    async with services.lease(IMAGES_LOCK, what="the images"):
        size = adopt(_file(context), services.layout.memory_file(request.id))
        memory = Memory(
            id=request.id,
            file_size=size,
            accelerator=context.notes["accelerator"],
            running=context.notes["phase"] == Phase.RUNNING,
        )
        ended: EndReason = "host-shutdown" if request.reason == "host-shutdown" else "stopped"
        end = Exit(at=time.time(), reason=ended, detail="it was suspended")
        services.records.put_vm(
            replace(vm, run=None, suspended=memory, suspended_because=request.reason, last_exit=end)
        )
    services.records.add_event("vm.suspended", vm_id=vm.id, name=vm.name, data={"reason": request.reason})


async def _end(context: Context[SuspendRequest]) -> None:
    # Its process isn't recorded any more. It may be killed: it gave up its disks when the memory was complete.
    services, vm = context.services, context.vm
    if services.inherits is None or not vm.sleeps:
        await kill_strays(services, vm)
        if not vm.sleeps:
            await network_ports.unpublish_all(services, vm.spec.nics)
        return
    kept = bells.Kept()
    for engine in engines_of(vm):
        kept = bells.inherit(services, vm, engine)
    services.inherits[vm.id] = kept
    await kill_strays(services, vm, kept=bells.names_of(kept.descriptors))


SUSPEND = Verb(
    name="suspend",
    request=SuspendRequest,
    steps=(
        Step("check", _check),
        Step("save", _save, _go_on),
        Step("record", _record, final=True),
        Step("end", _end),
    ),
)
