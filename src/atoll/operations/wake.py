"""Letting a VM go on that was suspended since nobody used it, or since memory ran out, because somebody wants it."""

from typing import Literal

from atoll.errors import Busy, WrongState
from atoll.host import facts
from atoll.model.operation import Progress
from atoll.model.pressure import RUN_COSTS
from atoll.model.state import Phase
from atoll.model.units import format_size
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.services import Report, Services
from atoll.operations.start import start


async def wake(
    vm: Vm, *, services: Services, by: Literal["command", "connection"], report: Report | None = None
) -> None:
    """Let it go on; fine if somebody else has done it. Raises what a start does: `Busy` where there is no memory."""
    _check_memory(vm, services)
    if report is not None:
        report(Progress(step=f"wake {vm.name}"))
    try:
        await start(vm, services=services, report=report)
    except WrongState:
        if observe.phase_of(services, services.vm(vm.id)) is not Phase.RUNNING:
            raise
        return
    services.records.add_event("vm.woken", vm_id=vm.id, name=vm.name, data={"by": by})


def _check_memory(vm: Vm, services: Services) -> None:
    """One that was suspended for want of memory would only be suspended again."""
    if services.pressure is None or vm.suspended is None or vm.suspended_because != "memory":
        return
    reserve, needs = services.pressure.reserve, vm.suspended.file_size + RUN_COSTS
    left = max(0, facts.memory().available - reserve)
    if needs > left:
        raise Busy(
            f"{vm.name} sleeps, and can't be woken: the computer's memory is short",
            f"it takes {format_size(needs)}; {format_size(left)} is left above the {format_size(reserve)} to be kept",
            "Stop another VM, or wait: it goes on by itself when there is memory. `atoll top --host` shows it.",
        )
