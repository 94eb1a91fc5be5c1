"""Stop every VM that runs within a time limit: those of the highest boot order first, those of one number side by side.

Each number gets its share of the time that is left, so that one guest that hangs doesn't take it from all others.
"""

import asyncio
import time
from collections.abc import Sequence
from itertools import groupby

from msgspec import Struct

from atoll.errors import AtollError
from atoll.model.operation import Progress
from atoll.model.supervision import is_restarted
from atoll.model.vm import Stopped, Vm
from atoll.operations import observe
from atoll.operations.remove import remove
from atoll.operations.services import Report, Services
from atoll.operations.stop import stop
from atoll.operations.suspend import suspend

LOOKS = 3
AT_ONCE = 100
"""Each takes some open files while it is stopped."""
TO_ASK = 0.9
"""The part of a number's time in which guests are asked; then they are switched off."""


class StopAll(Struct, frozen=True, kw_only=True):
    """How it is done."""

    timeout: float
    suspend: bool = False
    """Memory is kept on the disk where there is time for that."""
    for_shutdown: bool = False
    """The computer goes down: what is to be restarted returns at its next boot, not before."""


async def stop_all(how: StopAll, *, services: Services, report: Report | None = None) -> list[Stopped]:
    """Returns what became of each; none keeps the others from being stopped.

    What is about to start meanwhile is stopped as well: the agent starts nothing more for the computer's boot, and
    whoever has started since is found by another look.
    """
    services.records.add_event("host.stopping", data={"for_shutdown": how.for_shutdown})
    deadline = time.monotonic() + how.timeout
    done: dict[str, Stopped] = {}
    for _ in range(LOOKS):
        found = await _stop_running(how, deadline, services=services, report=report)
        if not found:
            break
        done |= {each.id: each for each in found}
    return list(done.values())


async def _stop_running(how: StopAll, deadline: float, *, services: Services, report: Report | None) -> list[Stopped]:
    vms = [info.vm for info in observe.list_vms(services) if _concerns(info.vm)]
    ordered = sorted(vms, key=lambda vm: -vm.boot_order)
    groups = [list(group) for _, group in groupby(ordered, key=lambda vm: vm.boot_order)]
    done: list[Stopped] = []
    for number, group in enumerate(groups):
        seconds = max(0.0, deadline - time.monotonic()) / (len(groups) - number)
        done += await _stop_group(group, how, seconds=seconds, services=services)
        if report is not None:
            report(Progress(step="stop VMs", done=len(done), total=len(vms), unit="steps"))
    return [each for each in done if each.outcome != "nothing"]


def _concerns(vm: Vm) -> bool:
    """It runs, or it waits to be started again."""
    if vm.run is not None or vm.last_exit is None:
        return vm.run is not None
    return is_restarted(vm.restart, vm.last_exit.reason, asked=vm.last_exit.asked)


async def _stop_group(group: Sequence[Vm], how: StopAll, *, seconds: float, services: Services) -> list[Stopped]:
    deadline, places = time.monotonic() + seconds * TO_ASK, asyncio.Semaphore(AT_ONCE)

    async def one(vm: Vm) -> Stopped:
        async with places:
            return await _stop_one(vm, how, deadline, services)

    return list(await asyncio.gather(*map(one, group)))


async def _stop_one(vm: Vm, how: StopAll, deadline: float, services: Services) -> Stopped:
    if how.suspend and vm.run is not None and vm.pool is None and await _suspended(vm, how, deadline, services):
        return Stopped(id=vm.id, name=vm.name, outcome="suspended")
    left = max(0.0, deadline - time.monotonic())
    try:
        await stop(
            vm,
            services=services,
            force=left == 0 or vm.pool is not None,
            timeout=left,
            for_shutdown=how.for_shutdown,
        )
        if vm.remove_when_stopped:
            await remove(services.vm(vm.id), services=services)
    except AtollError as error:
        return Stopped(id=vm.id, name=vm.name, outcome="failed", error=error.text)
    return Stopped(id=vm.id, name=vm.name, outcome="stopped" if vm.run is not None else "nothing")


async def _suspended(vm: Vm, how: StopAll, deadline: float, services: Services) -> bool:
    """Whether its memory could be kept in time."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            await suspend(vm, services=services, reason="host-shutdown" if how.for_shutdown else "asked")
    except (AtollError, TimeoutError):
        return False
    return True
