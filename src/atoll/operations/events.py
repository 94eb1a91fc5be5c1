"""Following what happens: recorded events, and QEMUs that end while nobody of ours looks at them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from atoll.host import facts
from atoll.host.watch import changes, wait_for_exit
from atoll.model.vm import Event, Run, Vm
from atoll.operations import networks, observe
from atoll.operations.services import Services

_BEGINNINGS = frozenset({"vm.started", "vm.restored"})
_AGAIN = 0.2


async def follow_events(services: Services, *, after: int) -> AsyncIterator[Event]:
    """Events from `after` on, as they come. A VM's end is recorded by whoever notices it first: here, at once."""
    ends = None if services.ends_noticed else _Ends(services)
    try:
        if ends is not None:
            for vm in services.records.vms():
                ends.watch(vm)
        async for _ in changes(services.layout.wake):
            while found := services.records.events(after=after):
                for event in found:
                    after = event.id
                    if ends is not None and event.kind in _BEGINNINGS and event.vm_id is not None:
                        ends.watch(services.records.vm(event.vm_id))
                    yield event
    finally:
        if ends is not None:
            await ends.close()


class _Ends:
    """Waits for the ends of QEMUs, and records them."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._watched: dict[Run, asyncio.Task[None]] = {}

    def watch(self, vm: Vm | None) -> None:
        if vm is not None and vm.run is not None and vm.run not in self._watched:
            self._watched[vm.run] = asyncio.create_task(self._record_its_end(vm.id, vm.run))

    async def close(self) -> None:
        for task in self._watched.values():
            task.cancel()
        await asyncio.gather(*self._watched.values(), return_exceptions=True)

    async def _record_its_end(self, vm_id: str, run: Run) -> None:
        records = self._services.records
        with contextlib.suppress(Exception):
            if facts.is_alive(run):
                await wait_for_exit(run.pid)
            # An operation that holds the lock may record the end itself; one that doesn't ends soon.
            while (current := records.vm(vm_id)) is not None and current.run == run:
                observe.record_end(self._services, current)
                if (current := records.vm(vm_id)) is not None and current.run == run:
                    await asyncio.sleep(_AGAIN)
            await networks.mend_left(self._services)
        self._watched.pop(run, None)
