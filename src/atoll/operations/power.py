"""pause, resume

    step     do                                                                       undo
    pause    stop the guest's CPUs, or let them go on: can be given again             the other command
    tell     the event                                                                (point of no return)

A VM that is paused already is left out beforehand, so what is undone is what was done.
"""

from msgspec import Struct

from atoll.errors import StorageFailed, TimedOut, WrongState
from atoll.host.sockets import connect
from atoll.model.state import Phase, require
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.guest_settle import leave_word
from atoll.operations.services import Services
from atoll.qemu.monitor import Monitor

STOPS_AGAIN = 0.5
"""Seconds within which a guest that goes on, though the disk is still full, has stopped again."""


class PowerRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str


def control(services: Services, vm: Vm) -> Monitor:
    """QMP for who holds the VM's lock. Raises `WrongState` when QEMU is gone."""
    try:
        return Monitor(connect(services.layout.vm(vm.id).socket("control")))
    except OSError as error:
        raise WrongState(f"{vm.name}: QEMU can't be reached", str(error), f"See `atoll show {vm.name}`.") from error


async def pause(vm: Vm, *, services: Services) -> None:
    """Stop the guest's CPUs. Fine if it is paused. Raises `WrongState`."""
    if observe.phase_of(services, vm) is Phase.PAUSED:
        return
    await perform(PAUSE, PowerRequest(vm_id=vm.id), services=services, subject=vm.id, subject_name=vm.name)


async def resume(vm: Vm, *, services: Services) -> None:
    """Let the guest go on. Fine if it runs. Raises `WrongState`."""
    if observe.phase_of(services, vm) is Phase.RUNNING:
        return
    await perform(RESUME, PowerRequest(vm_id=vm.id), services=services, subject=vm.id, subject_name=vm.name)
    if vm.spec.shares:
        from atoll.operations.share import mount_all

        await mount_all(services, vm)


async def _pause(context: Context[PowerRequest]) -> None:
    phase = observe.phase_of(context.services, context.vm)
    if phase is Phase.PAUSED:
        return
    require(context.vm.name, phase, "pause")
    async with control(context.services, context.vm) as monitor:
        await monitor.execute("stop")


async def _resume(context: Context[PowerRequest]) -> None:
    phase = observe.phase_of(context.services, context.vm)
    if phase is Phase.RUNNING:
        return
    require(context.vm.name, phase, "resume")
    if context.vm.spec.guest.agent:
        leave_word(context.services.layout.vm(context.vm.id), time=True)
    await go_on(context.services, context.vm)


async def go_on(services: Services, vm: Vm) -> None:
    """Let a guest that stands still run, for whoever holds the VM's lock. Fine if it does, or has ended meanwhile.

    Raises `StorageFailed` when the disk is full on which it waits for room.
    """
    info = observe.observe_one(services, vm)
    if info.phase is not Phase.PAUSED:
        return
    waits_for_room = info.trouble == "disk-full"
    async with control(services, vm) as monitor, monitor.events(["STOP"]) as stops:
        await monitor.execute("cont")
        if not waits_for_room:
            return
        try:
            await stops.next(timeout=STOPS_AGAIN)
        except TimedOut:
            return
    raise StorageFailed(
        f"{vm.name}: it can't go on",
        "this computer's disk is full, and what it writes waits for room",
        f"Free some space (`atoll prune`), then `atoll resume {vm.name}`.",
    )


async def _unpause(context: Context[PowerRequest]) -> None:
    await _give(context, "cont", Phase.PAUSED)


async def _pause_again(context: Context[PowerRequest]) -> None:
    await _give(context, "stop", Phase.RUNNING)


async def _give(context: Context[PowerRequest], command: str, phase: Phase) -> None:
    """The command, to a VM that is there and in that phase."""
    vm = context.services.records.vm(context.subject)
    if vm is not None and observe.phase_of(context.services, vm) is phase:
        async with control(context.services, vm) as monitor:
            await monitor.execute(command)


async def _tell_paused(context: Context[PowerRequest]) -> None:
    context.services.records.add_event("vm.paused", vm_id=context.subject, name=context.vm.name)


async def _tell_resumed(context: Context[PowerRequest]) -> None:
    context.services.records.add_event("vm.resumed", vm_id=context.subject, name=context.vm.name)


PAUSE = Verb(
    name="pause",
    request=PowerRequest,
    durable=False,
    steps=(Step("pause", _pause, _unpause), Step("tell", _tell_paused, final=True)),
)
RESUME = Verb(
    name="resume",
    request=PowerRequest,
    durable=False,
    steps=(Step("resume", _resume, _pause_again), Step("tell", _tell_resumed, final=True)),
)
