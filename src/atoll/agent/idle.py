"""The agent suspends VMs that nobody uses, where that is wanted, and hangs up their bells (`agent/bells.py`).

What is known of a VM is what it did in the time that counts; a new agent begins anew.
"""

import asyncio
import contextlib
import time

from atoll.agent.bells import Bells, finished
from atoll.agent.recover import MISHAP_DELAY, Tell
from atoll.errors import AtollError
from atoll.host import facts
from atoll.model import idle
from atoll.model.idle import Reading
from atoll.model.state import Phase
from atoll.model.vm import Run, Vm
from atoll.operations import look, observe, uses
from atoll.operations.events import follow_events
from atoll.operations.services import Services
from atoll.operations.suspend import has_callers, suspend
from atoll.platform.local import LocalHost

BELLS_AGAIN = 10.0
"""Seconds until ports that another program had are tried once more."""
BURST = 0.2
"""Seconds in which what happens is looked at once: each look reads all records that have changed."""
_TOGETHER = 4
"""Suspensions at the same time: each writes a memory to the disk."""


async def watch_idleness(host: LocalHost, *, tell: Tell) -> None:
    """Until cancelled. A mishap is told, and the watch goes on."""
    while True:
        bells = Bells(host.services, tell)
        watch = _Watch(host.services, bells, tell)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(watch.follow())
                group.create_task(watch.look())
        except* Exception as mishaps:
            tell(f"Error: watching for idle VMs: {'; '.join(map(str, mishaps.exceptions))}")
        finally:
            await watch.close()
            await bells.close()
        await asyncio.sleep(MISHAP_DELAY)


class _Seen:
    """What is known of one run of a VM."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.window: tuple[Reading, ...] = ()
        """Readings since it was used last."""
        self.looked_at = 0.0
        self.due = 0.0
        self._wanted: tuple[float, dict[int, float]] = (0.0, {})

    def is_starved(self, wanted: dict[int, float]) -> bool:
        """Whether one of its threads has had something to do all the time since the last look, run or not."""
        (before, had), self._wanted = self._wanted, (time.monotonic(), wanted)
        seconds = self._wanted[0] - before
        return any(now - had.get(thread, now) > idle.ALWAYS * seconds for thread, now in wanted.items())


class _Watch:
    """One watch."""

    def __init__(self, services: Services, bells: Bells, tell: Tell) -> None:
        self._services = services
        self._bells = bells
        self._tell = tell
        self._seen: dict[str, _Seen] = {}
        self._changed = asyncio.Event()
        self._suspending: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(_TOGETHER)

    async def close(self) -> None:
        await finished(list(self._suspending.values()))

    async def follow(self) -> None:
        last = self._services.records.last_event()
        for vm in self._services.records.vms():
            if vm.sleeps:
                self._bells.look_at(vm.id)
        async for event in follow_events(self._services, after=last):
            if event.vm_id is not None and event.kind.startswith("vm."):
                self._bells.look_at(event.vm_id)
                self._changed.set()

    async def look(self) -> None:
        """At each VM when it is due."""
        while True:
            self._changed.clear()
            due = await self._look_at_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, due - time.monotonic())):
                    await self._changed.wait()
                    await asyncio.sleep(BURST)
            self._bells.try_again()

    async def _look_at_all(self) -> float:
        """Returns when the next look is due."""
        now = time.monotonic()
        wanted = [vm for vm in self._services.records.vms() if _is_watched(vm)]
        self._seen = {vm.id: self._seen_of(vm) for vm in wanted}
        due = [vm for vm in wanted if self._seen[vm.id].due <= now and vm.id not in self._suspending]
        # Who is in use isn't asked: QEMU's monitor serves one at a time, and those who use it may want it.
        quiet = self._not_used(due) if due else []
        for info in observe.observe(self._services, quiet, {}) if quiet else []:
            await self._look_at(info.vm, running=info.phase is Phase.RUNNING)
        return min([seen.due for seen in self._seen.values()], default=now + BELLS_AGAIN)

    def _seen_of(self, vm: Vm) -> _Seen:
        assert vm.run is not None
        before = self._seen.get(vm.id)
        return before if before is not None and before.run == vm.run else _Seen(vm.run)

    def _not_used(self, vms: list[Vm]) -> list[Vm]:
        """Those that nobody uses, nor has used since the last look."""
        working = {each.subject for each in self._services.records.operations(unfinished=True)}
        connected, found = facts.connected_ports(), []
        for vm in vms:
            seen, last_look = self._seen[vm.id], self._seen[vm.id].looked_at
            seen.looked_at = time.time()
            seen.due = time.monotonic() + idle.pause(vm.suspend_when_idle or 0)
            with uses.unused(self._services.layout, vm.id) as free:
                used = not free or uses.last(self._services.layout, vm.id) >= last_look
            if used or vm.id in working or has_callers(vm, connected):
                seen.window = ()
            else:
                found.append(vm)
        return found

    async def _look_at(self, vm: Vm, *, running: bool) -> None:
        seen, after = self._seen.get(vm.id), vm.suspend_when_idle
        if seen is None or after is None or vm.run is None:
            return
        if not running:
            # Somebody has paused it, or it can't go on: that isn't to be changed.
            seen.window = ()
            return
        try:
            frames = await look.frames(vm, services=self._services)
            took = facts.cpu_seconds(vm.run.pid)
            starved = seen.is_starved(facts.wanted_seconds(vm.run.pid))
        except (AtollError, OSError):
            # It ends just now, or doesn't answer: it isn't idle for all that is known.
            seen.window = ()
            return
        if starved:
            seen.window = ()
            return
        seen.window = idle.with_reading(
            seen.window, Reading(at=time.time(), cpu_seconds=took, frames=frames), after=after
        )
        if idle.is_idle(seen.window, after=after):
            self._suspending[vm.id] = asyncio.create_task(self._suspend(vm, after))

    async def _suspend(self, vm: Vm, after: float) -> None:
        try:
            async with self._places:
                with uses.unused(self._services.layout, vm.id) as free:
                    current = self._services.records.vm(vm.id)
                    if free and current is not None and current.run == vm.run and _is_watched(current):
                        await suspend(current, services=self._services, reason="idle")
                        self._tell(f"'{vm.name}' was suspended: nobody used it for {idle.shown(after)}")
        except AtollError as error:
            self._tell(f"Note: '{vm.name}' wasn't suspended: {error.text}")
        finally:
            self._seen.pop(vm.id, None)
            del self._suspending[vm.id]
            self._changed.set()


def _is_watched(vm: Vm) -> bool:
    return vm.suspend_when_idle is not None and vm.run is not None and vm.pool is None
