"""Following what happens: recorded events, and QEMUs that end while nobody of ours looks at them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from atoll.host import facts
from atoll.host.watch import changes, wait_for_exit
from atoll.model.vm import Event, Vm
from atoll.operations import networks, observe
from atoll.operations.services import Services


async def follow_events(services: Services, *, after: int) -> AsyncIterator[Event]:
    """Events from `after` on, as they come. A VM's end is recorded by whoever notices it first: here, at once."""
    watched: dict[str, asyncio.Task[None]] = {}
    wake = asyncio.Event()
    waker = asyncio.create_task(_wake_on_change(services, wake))
    try:
        while True:
            wake.clear()
            _watch_running(services, watched, wake)
            for event in services.records.events(after=after):
                after = event.id
                yield event
            await wake.wait()
    finally:
        for task in (waker, *watched.values()):
            task.cancel()
        await asyncio.gather(waker, *watched.values(), return_exceptions=True)


async def _wake_on_change(services: Services, wake: asyncio.Event) -> None:
    async for _ in changes(services.layout.wake):
        wake.set()


def _watch_running(services: Services, watched: dict[str, asyncio.Task[None]], wake: asyncio.Event) -> None:
    for key in [key for key, task in watched.items() if task.done()]:
        del watched[key]
    for vm in services.records.vms():
        if vm.run is None:
            continue
        key = f"{vm.id}:{vm.run.pid}:{vm.run.start_time}"
        if key not in watched:
            watched[key] = asyncio.create_task(_record_its_end(services, vm, wake))


async def _record_its_end(services: Services, vm: Vm, wake: asyncio.Event) -> None:
    assert vm.run is not None
    if facts.is_alive(vm.run):
        await wait_for_exit(vm.run.pid)
    # An operation that stops it holds the lock and records the end itself; it is woken for by the wake file.
    with contextlib.suppress(Exception):
        current = services.records.vm(vm.id)
        if current is not None and current.run == vm.run:
            observe.record_end(services, current)
            await networks.mend_left(services)
    wake.set()
