"""Letting a VM go on that was suspended since nobody used it, or since memory ran out, because somebody wants it."""

from typing import Literal

from atoll.errors import WrongState
from atoll.model.operation import Progress
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.services import Report, Services
from atoll.operations.start import start


async def wake(
    vm: Vm, *, services: Services, by: Literal["command", "connection"], report: Report | None = None
) -> None:
    """Let it go on; fine if somebody else has done it. Raises what a start does: `Busy` where there is no memory."""
    if report is not None:
        report(Progress(step=f"wake {vm.name}"))
    try:
        await start(vm, services=services, report=report)
    except WrongState:
        if observe.phase_of(services, services.vm(vm.id)) is not Phase.RUNNING:
            raise
        return
    services.records.add_event("vm.woken", vm_id=vm.id, name=vm.name, data={"by": by})
