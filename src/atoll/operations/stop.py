"""stop

step        do                                                                         undo
shut down   ask the agent, press the power button, end QEMU when the time has gone     none: what was asked is asked
record      how it ended                                                               (point of no return)
"""

import asyncio
import contextlib
import time
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AtollError
from atoll.host import cgroups, facts
from atoll.host.sockets import connect
from atoll.host.watch import wait_for_exit
from atoll.model.operation import Progress
from atoll.model.state import Phase
from atoll.model.vm import Exit, Vm
from atoll.operations import guest_setup, network_ports, observe, power
from atoll.operations.boot import helpers_ended, kill, kill_strays
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.services import Report, Services
from atoll.qemu.monitor import Monitor

PRESS_AGAIN = 5.0
"""Seconds after which the power button is pressed once more: a guest that is still booting misses it."""
QUIT_TIME = 10.0
"""Seconds that QEMU has to flush its disks and quit before it is killed."""


class StopRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    force: bool = False
    timeout: float = 60.0
    """Seconds for the guest to shut down by itself."""


async def stop(
    vm: Vm, *, services: Services, force: bool = False, timeout: float = 60.0, report: Report | None = None
) -> None:
    """Stop a VM; nothing happens to one that is stopped. With `force` whatever works on it is cancelled first."""
    if force:
        for operation in services.records.operations(unfinished=True):
            if operation.subject == vm.id and operation.state == "running":
                services.records.request_cancel(operation.id)
    request = StopRequest(vm_id=vm.id, force=force, timeout=timeout)
    await perform(STOP, request, services=services, subject=vm.id, subject_name=vm.name, report=report)


async def _shut_down(context: Context[StopRequest]) -> None:
    services, vm, request = context.services, context.vm, context.request
    if vm.run is None or not facts.is_alive(vm.run):
        await kill_strays(services, vm)
        return
    gone = asyncio.ensure_future(wait_for_exit(vm.run.pid))
    try:
        if request.force:
            context.notes["how"] = "forced"
        else:
            context.notes["how"] = await _ask(context, vm, gone)
        if not gone.done():
            await end(services, vm, gone)
        await helpers_ended(services, vm)
    finally:
        gone.cancel()


async def _ask(context: Context[StopRequest], vm: Vm, gone: "asyncio.Future[None]") -> str:
    """Ask in every way the guest may understand, until it is gone or the time is. Returns what did it."""
    timeout = context.request.timeout
    deadline = time.monotonic() + timeout
    phase = observe.phase_of(context.services, vm)
    if phase is Phase.CRASHED:
        return "its guest had crashed"
    if phase is Phase.PAUSED:
        await power.go_on(context.services, vm)
    if vm.spec.guest.agent and await _agent_took_it(context, vm):
        context.report(Progress(step="the guest shuts down", total=timeout, unit="seconds"))
        if await _is_gone(gone, min(timeout, max(timeout / 2, timeout - 20))):
            return "by the guest agent"
    context.report(Progress(step="the power button is pressed", total=timeout, unit="seconds"))
    while (left := deadline - time.monotonic()) > 0:
        await _press_power_button(context.services, vm)
        if await _is_gone(gone, min(left, PRESS_AGAIN)):
            return "by the power button"
    return f"forced after {timeout:g} s"


async def _press_power_button(services: Services, vm: Vm) -> None:
    with contextlib.suppress(AtollError, OSError):
        async with Monitor(connect(services.layout.vm(vm.id).socket("control"))) as monitor:
            await monitor.execute("system_powerdown")


async def _agent_took_it(context: Context[StopRequest], vm: Vm) -> bool:
    try:
        await guest_setup.shutdown(context.services.layout.vm(vm.id), mode="powerdown")
    except AtollError:
        return False
    return True


async def _is_gone(gone: "asyncio.Future[None]", seconds: float) -> bool:
    await asyncio.wait([gone], timeout=max(0.0, seconds))
    return gone.done()


async def end(services: Services, vm: Vm, gone: "asyncio.Future[None]") -> None:
    """End QEMU: `quit` writes back what it holds of the disks; a QEMU that doesn't listen is killed."""
    with contextlib.suppress(AtollError, OSError):
        async with Monitor(connect(services.layout.vm(vm.id).socket("control")), timeout=QUIT_TIME / 2) as monitor:
            with contextlib.suppress(AtollError):
                await monitor.execute("quit", timeout=QUIT_TIME / 2)
    if vm.run is not None and not await _is_gone(gone, QUIT_TIME / 2):
        await kill(vm.run.pid)


async def _record(context: Context[StopRequest]) -> None:
    from atoll.operations.suspend import drop

    record_stopped(context.services, context.vm, str(context.notes.get("how", "")))
    drop(context.services, context.vm)
    await network_ports.unpublish_all(context.services, context.vm.spec.nics)


def record_stopped(services: Services, vm: Vm, how: str) -> None:
    """Write down that it ended, unless that is written already."""
    if vm.run is None:
        return
    end = observe.evidence(vm, services.layout.vm(vm.id))
    reason: Literal["stopped"] = "stopped"
    if how and end.reason != "guest-panic":
        end = Exit(at=time.time(), reason=reason, detail=how)
    services.records.put_vm(replace(vm, run=None, last_exit=end))
    cgroups.remove(vm.id)
    services.records.add_event(
        "vm.stopped", vm_id=vm.id, name=vm.name, data={"reason": end.reason, "detail": end.detail}
    )


STOP = Verb(
    name="stop",
    request=StopRequest,
    steps=(
        Step("shut down", _shut_down),
        Step("record", _record, final=True),
    ),
)
