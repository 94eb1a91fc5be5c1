"""The agent watches: what ended is started again or removed, what belongs to the computer's boot is started.

Nothing here is remembered but how often a VM was started in a row: the records say how each run ended and what is
wanted, so an agent that was killed goes on where it was.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine
from itertools import groupby
from typing import Any

from msgspec.structs import replace

from atoll.agent.engine_events import EngineLogs
from atoll.agent.recover import MISHAP_DELAY, Tell, recover_as_found
from atoll.agent.state import State
from atoll.errors import AtollError, NotFound, TimedOut, WrongState
from atoll.host import facts, files
from atoll.model.state import Phase
from atoll.model.supervision import Attempts, is_restarted, next_attempt, returns_after_boot
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.events import follow_events
from atoll.operations.services import Services
from atoll.operations.stop import end_crashed
from atoll.platform.local import LocalHost
from atoll.platform.local_vm import LocalVm

TIME_TO_BE_READY = 120.0
"""Seconds that those of one boot order have before the next ones are started."""
REMOVAL_DELAY = 1.0
"""Seconds that a command has to remove the throw-away VM that it ran itself."""
_BEGINNINGS = frozenset({"vm.started", "vm.restored"})
_ENDS = frozenset({"vm.ended", "vm.stopped", "vm.suspended"})
_CRASHES = frozenset({"vm.panicked", "vm.watchdog"})


async def supervise(host: LocalHost, state: State, *, tell: Tell) -> None:
    """Watch over the host's VMs until cancelled. A mishap is told, and the watch goes on."""
    while True:
        services = Services(host.layout)
        supervisor = Supervisor(host, services, state, tell)
        try:
            await supervisor.watch()
        except* Exception as mishaps:
            tell(f"Error: watching over the VMs: {'; '.join(map(str, mishaps.exceptions))}")
        finally:
            await supervisor.close()
            services.close()
        await asyncio.sleep(MISHAP_DELAY)


class Supervisor:
    """One watch."""

    def __init__(self, host: LocalHost, services: Services, state: State, tell: Tell) -> None:
        self._host = host
        self._services = services
        self._tell = tell
        self._attempts: dict[str, Attempts] = {}
        self._work: dict[str, asyncio.Task[None]] = {}
        """One thing at a time for each VM."""
        # QEMU's own start is what takes the time, and it is the processors' alone.
        self._places = asyncio.Semaphore((os.cpu_count() or 1) + 1)
        self._logs = EngineLogs(services, state)
        self._boot: asyncio.Task[None] | None = None
        self._boot_is_over = False
        """Somebody stops all VMs before those of the boot have started."""
        self._of_boot: set[str] = set()
        """VMs that are about to be started as this computer's boot wants it."""

    async def watch(self) -> None:
        """Until cancelled, or until one of the things that are done side by side fails."""
        async with asyncio.TaskGroup() as group:
            group.create_task(recover_as_found(self._services, tell=self._tell))
            group.create_task(self._logs.read())
            await self._follow(group)

    async def _follow(self, group: asyncio.TaskGroup) -> None:
        last = self._services.records.last_event()
        self._logs.begin(self._services.records.vms())
        # Looking at them records the ends of those that ended while nobody watched.
        infos = observe.list_vms(self._services)
        everyone = [info.vm for info in infos]
        if not self._has_booted():
            belonging = [vm for vm in everyone if _returns_after_boot(vm)]
            self._of_boot = {vm.id for vm in belonging}
            self._boot = group.create_task(self._start_for_boot(belonging))
        for info in infos:
            self._look_at(info.vm.id, crashed=info.phase is Phase.CRASHED)
        async for event in follow_events(self._services, after=last):
            if event.vm_id is not None:
                self._on_event(event.kind, event.vm_id)
            elif event.kind == "host.stopping" and self._boot is not None:
                self._boot_is_over = True
                self._boot.cancel()

    def _on_event(self, kind: str, vm_id: str) -> None:
        if kind in _BEGINNINGS and (vm := self._services.records.vm(vm_id)) is not None:
            self._logs.follow(vm)
        elif kind in _ENDS:
            self._logs.drop(vm_id)
            self._look_at(vm_id)
        elif kind in _CRASHES:
            self._look_at(vm_id, crashed=True)
        elif kind == "vm.removed":
            self._logs.forget(vm_id)
            self._attempts.pop(vm_id, None)

    async def close(self) -> None:
        for task in self._work.values():
            task.cancel()
        await asyncio.gather(*self._work.values(), return_exceptions=True)
        self._logs.close()

    def _look_at(self, vm_id: str, *, crashed: bool = False) -> None:
        """Begin what is to be done about a VM, unless something is being done."""
        vm = self._services.records.vm(vm_id)
        if vm is None or vm_id in self._work or vm_id in self._of_boot:
            return
        if _is_to_be_removed(vm):
            self._begin(vm, self._remove(vm))
        elif _is_to_be_restarted(vm):
            self._begin(vm, self._restart(vm))
        elif crashed and vm.restart != "never":
            self._begin(vm, self._end_crashed(vm))

    def _begin(self, vm: Vm, work: Coroutine[Any, Any, bool]) -> None:
        async def run() -> None:
            again = True
            try:
                again = await work
            except Exception as error:
                self._tell(f"Error: {vm.name}: {error}")
            finally:
                del self._work[vm.id]
            if again:
                self._look_at(vm.id)

        self._work[vm.id] = asyncio.create_task(run())

    async def _remove(self, vm: Vm) -> bool:
        await asyncio.sleep(REMOVAL_DELAY)
        current = self._services.records.vm(vm.id)
        if current is None or not _is_to_be_removed(current):
            return True
        with contextlib.suppress(NotFound, WrongState):
            await (await self._host.get(vm.id)).rm()
            self._tell(f"'{vm.name}' had stopped; it was removed, as --rm asked.")
        return False

    async def _end_crashed(self, vm: Vm) -> bool:
        """A guest that has crashed while its QEMU lives has ended, too."""
        await end_crashed(vm, services=self._services)
        return True

    async def _restart(self, vm: Vm) -> bool:
        assert vm.last_exit is not None
        ended_at = vm.last_exit.at
        while True:
            attempt, delay = next_attempt(self._attempts.get(vm.id, Attempts()), ended_at=ended_at)
            await asyncio.sleep(delay)
            current = self._services.records.vm(vm.id)
            if current is None or not _is_to_be_restarted(current):
                return True
            self._attempts[vm.id] = replace(attempt, started_at=time.time())
            try:
                await self._start(vm)
            except (NotFound, WrongState):
                # Somebody was faster.
                return True
            except AtollError as error:
                self._record_failure(current, error)
                ended_at = time.time()
                continue
            data = {"reason": vm.last_exit.reason, "count": attempt.count}
            self._services.records.add_event("vm.restarted", vm_id=vm.id, name=current.name, data=data)
            self._tell(f"'{current.name}' was started again: {vm.last_exit.reason}, {vm.last_exit.detail}")
            return True

    async def _start(self, vm: Vm) -> LocalVm:
        async with self._places:
            reached = await self._host.get(vm.id)
            await reached.start()
            return reached

    def _record_failure(self, vm: Vm, error: AtollError) -> None:
        self._services.records.add_event("vm.restart-failed", vm_id=vm.id, name=vm.name, data={"error": error.text})
        self._tell(f"Error: {error.text}")

    # This computer's boot

    def _has_booted(self) -> bool:
        with contextlib.suppress(OSError):
            return self._services.layout.booted.read_text() == facts.boot_id()
        return False

    async def _start_for_boot(self, belonging: list[Vm]) -> None:
        """Start what belongs to the boot, in its order. A number waits for the ones before, but not for ever.

        That it is done is noted at the end: if the agent is killed on the way, the next one goes on with the rest.
        """
        ordered = sorted(belonging, key=lambda vm: vm.boot_order)
        try:
            for _, group in groupby(ordered, key=lambda vm: vm.boot_order):
                await asyncio.gather(*(self._start_one_for_boot(vm) for vm in group))
        except asyncio.CancelledError:
            if not self._boot_is_over:
                raise
            self._of_boot.clear()
        files.make_folder(self._services.layout.run)
        files.write_atomically(self._services.layout.booted, facts.boot_id().encode())

    async def _start_one_for_boot(self, vm: Vm) -> None:
        try:
            reached = await self._start(vm)
            self._services.records.add_event("vm.autostarted", vm_id=vm.id, name=vm.name)
            self._of_boot.discard(vm.id)
            await reached.wait("ready", timeout=TIME_TO_BE_READY)
        except (NotFound, WrongState):
            pass
        except TimedOut as error:
            self._tell(f"Note: {error.text}")
        except AtollError as error:
            self._record_failure(vm, error)
        finally:
            self._of_boot.discard(vm.id)
            self._look_at(vm.id)


def _is_to_be_removed(vm: Vm) -> bool:
    return vm.remove_when_stopped and vm.run is None and vm.last_exit is not None and vm.suspended is None


def _is_to_be_restarted(vm: Vm) -> bool:
    if vm.run is not None or vm.last_exit is None or vm.suspended is not None:
        return False
    return is_restarted(vm.restart, vm.last_exit.reason, asked=vm.last_exit.asked)


def _returns_after_boot(vm: Vm) -> bool:
    if vm.run is not None or vm.pool is not None:
        return False
    reason, asked = (vm.last_exit.reason, vm.last_exit.asked) if vm.last_exit is not None else (None, False)
    return returns_after_boot(vm.restart, reason, asked=asked, autostart=vm.autostart)
