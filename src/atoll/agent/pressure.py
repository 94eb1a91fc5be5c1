"""The agent looks at the computer's memory, and does what `model/pressure.py` decides.

Nothing has to be remembered: what balloons hold is in QEMU, and why VMs sleep in their records. So the next agent gives
back what one that was killed has taken.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable

from msgspec.structs import replace

from atoll.agent.bells import finished
from atoll.agent.recover import MISHAP_DELAY, Tell
from atoll.errors import AtollError
from atoll.host import facts
from atoll.model import pressure
from atoll.model.pressure import Act, Figures, GoOn, Guest, MoveBalloon, PressurePolicy, Room, Sleeper, State, Suspend
from atoll.model.units import format_size
from atoll.model.vm import Run, Vm
from atoll.operations import balloon
from atoll.operations.suspend import suspend
from atoll.platform.local import LocalHost

INTERVAL, SHORT_INTERVAL = 1.0, 0.25
"""Seconds between two looks; the second when memory is near the reserve. The kernel has no event for that: its pressure
stalls (/proc/pressure) begin when programs wait already, and that is too late for a reserve.
"""
NEAR = 4
"""Margins above the reserve."""
ASK_INTERVAL = 1.0
MOVING_TIME = 2.0
"""Seconds after which a guest is taken to have done what its balloon was told."""
AGAIN = 5.0
"""Seconds after which something that failed is tried again."""
SCRAPE_INTERVAL, SCRAPED_LATELY = 10.0, 60.0
LITTLE = 1 << 20


class Pressure:
    """The watch over the memory, for as long as the agent is there."""

    def __init__(self, host: LocalHost, *, policy: PressurePolicy, reserve: int | None, tell: Tell) -> None:
        """`reserve` is what the computer shall have for itself; None for what fits its memory."""
        self._host = host
        self._services = host.services
        self._policy = policy
        self._tell = tell
        total = facts.memory().total
        self._reserve = pressure.default_reserve(total) if reserve is None else reserve
        self._margin = pressure.margin(total)
        self._state = State()
        self._readings: dict[str, balloon.Reading] = {}
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self._told_at: dict[str, float] = {}
        """When a VM's balloon was told something."""
        self._sure: dict[str, Run] = {}
        """Runs of which it is known what their balloons were told."""
        self._cpu: dict[str, tuple[float, float, float]] = {}
        """When a VM's processor time was read, how much it was, and how much it used a second before."""
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._failed_at: dict[str, float] = {}
        self._last_event = -1
        self._scraped_at = self._answered_at = float("-inf")
        self._polled = False
        """Guests are asked by their QEMUs, each second."""
        self._held: set[str] = set()
        """VMs whose balloons leave them less than they may have, or may come to."""
        self._figures = Figures(reserve=self._reserve)
        self._publish([], [])

    def scraped(self) -> None:
        """Somebody wants to know what guests use: they are asked while that goes on."""
        self._scraped_at = now = time.monotonic()
        if now - self._answered_at > SCRAPED_LATELY:
            self._figures = self._services.pressure = replace(self._figures, used={})

    async def watch(self) -> None:
        """Until cancelled. A mishap is told, and the watch goes on."""
        try:
            while True:
                try:
                    near = await self._look()
                except Exception as error:
                    self._tell(f"Error: watching over the memory: {error}")
                    await asyncio.sleep(MISHAP_DELAY)
                else:
                    await asyncio.sleep(SHORT_INTERVAL if near else INTERVAL)
        finally:
            asking = [self._asking] if self._asking is not None else []
            for task in asking:
                task.cancel()
            await finished([*self._leaving.values(), *self._coming.values(), *asking])

    async def _look(self) -> bool:
        """Look once, and do what follows from it; whether the memory is near its reserve."""
        now = time.monotonic()
        room = self._room()
        near = room.available < self._reserve + NEAR * self._margin
        before, self._state = self._state, pressure.now_in(self._state, room, now)
        if before.low is not self._state.low:
            self._tell_turn(room, lasted=now - before.since)
        if self._nothing_to_see(now):
            return near
        self._last_event = self._services.records.last_event()
        vms = self._services.records.vms()
        running = [vm for vm in vms if vm.run is not None and vm.pool is None and facts.is_alive(vm.run)]
        guests = self._guests(running, now)
        self._begin_asking(running, now)
        self._state, acts = pressure.decide(
            self._state, self._room(), guests, self._sleepers(vms, now), policy=self._policy, now=now
        )
        await self._do(acts, {vm.id: vm for vm in vms}, now)
        self._publish(vms, running)
        return near or self._state.low

    def _room(self) -> Room:
        return Room(available=facts.memory().available, reserve=self._reserve, margin=self._margin)

    def _nothing_to_see(self, now: float) -> bool:
        """Whether all is as it was: most of the time, so that this look has cost next to nothing."""
        if self._state.low or self._leaving or self._coming or self._polled or self._held or self._figures.asleep:
            return False
        return not self._scrape_is_due(now) and self._services.records.last_event() == self._last_event

    # What is seen

    def _begin_asking(self, running: list[Vm], now: float) -> None:
        """Ask guests while memory is low or somebody wants to know; else only those whose balloons aren't as they
        should be, or not known. What they say is there at a later look: slow ones mustn't hold up the others.
        """
        if now - self._asked_at < ASK_INTERVAL or self._asking is not None:
            return
        self._asked_at = now
        everyone = self._state.low or self._polled or self._scrape_is_due(now)
        if self._polled:
            # They have been asked in the last second, so what is read now is fresh.
            self._answered_at = now
        self._polled = self._state.low or (everyone and not self._polled)
        asked = [vm for vm in running if vm.id not in self._leaving and (everyone or vm.id in self._held)]
        self._asking = asyncio.create_task(self._ask(asked, interval=1 if self._polled else 0))

    async def _ask(self, asked: list[Vm], *, interval: int) -> None:
        try:
            found = await balloon.ask_all(self._services, asked, interval=interval)
        finally:
            self._asking = None
        self._readings |= found
        for vm in asked:
            if vm.run is not None and vm.id in found and found[vm.id].given is None:
                # It has no balloon, so nobody told it anything.
                self._sure[vm.id] = vm.run

    def _scrape_is_due(self, now: float) -> bool:
        return now - self._scraped_at < SCRAPED_LATELY and now - self._answered_at >= SCRAPE_INTERVAL

    def _guests(self, running: list[Vm], now: float) -> list[Guest]:
        ids = {vm.id for vm in running}
        for known in (self._readings, self._told_at, self._sure, self._cpu):
            for gone in known.keys() - ids:
                known.pop(gone)
        at_work = {each.subject for each in self._services.records.operations(unfinished=True)}
        found = []
        for vm in running:
            assert vm.run is not None
            reading = self._readings.get(vm.id)
            most, leaving = balloon.most_of(vm), vm.id in self._leaving
            failed = now - self._failed_at.get(vm.id, float("-inf")) < AGAIN
            stands_still = reading is not None and not reading.running
            guest = Guest(
                id=vm.id,
                most=most,
                floor=pressure.floor_of(most, vm.memory_min),
                given=reading.given if reading is not None else None,
                available=reading.available if reading is not None else None,
                mapped=reading is not None and reading.mapped,
                private=facts.memory_anonymous(vm.run.pid),
                activity=self._activity(vm.id, vm.run.pid, now),
                policy=vm.on_memory_pressure,
                may_sleep=not (vm.id in at_work or vm.remove_when_stopped or failed or stands_still),
                leaving=leaving,
                moving=now - self._told_at.get(vm.id, float("-inf")) < MOVING_TIME,
                unsure=self._sure.get(vm.id) != vm.run,
            )
            found.append(guest)
        self._held = {
            each.id for each in found if each.unsure or (each.given is not None and each.given + LITTLE < each.most)
        }
        return found

    def _activity(self, vm_id: str, pid: int, now: float) -> float:
        used = facts.cpu_seconds(pid)
        at, before, rate = self._cpu.get(vm_id, (float("-inf"), used, 0.0))
        if now - at >= 1.0:
            rate = (used - before) / (now - at)
            self._cpu[vm_id] = now, used, rate
        return rate

    def _sleepers(self, vms: Iterable[Vm], now: float) -> list[Sleeper]:
        if self._coming:
            return []
        return [
            Sleeper(
                id=vm.id,
                since=vm.last_exit.at if vm.last_exit is not None else 0.0,
                needs=vm.suspended.file_size + pressure.RUN_COSTS,
            )
            for vm in vms
            if sleeps(vm) and now - self._failed_at.get(vm.id, float("-inf")) >= AGAIN and vm.suspended is not None
        ]

    # What is done

    async def _do(self, acts: list[Act], vms: dict[str, Vm], now: float) -> None:
        for act in acts:
            if isinstance(act, Suspend):
                self._leaving[act.id] = asyncio.create_task(self._suspend(vms[act.id]))
            elif isinstance(act, GoOn):
                self._coming[act.id] = asyncio.create_task(self._go_on(vms[act.id]))
        moves = [act for act in acts if isinstance(act, MoveBalloon)]
        await asyncio.gather(*(self._move(vms[act.id], act.size, now) for act in moves))

    async def _move(self, vm: Vm, size: int, now: float) -> None:
        # One that can't be told now is told at a later look.
        with contextlib.suppress(AtollError):
            await balloon.move(self._services, vm, size)
            self._told_at[vm.id] = now
            if vm.run is not None:
                self._sure[vm.id] = vm.run

    async def _suspend(self, vm: Vm) -> None:
        try:
            self._tell(f"'{vm.name}' is suspended: the computer's memory is short.")
            await suspend(vm, services=self._services, reason="memory")
        except AtollError as error:
            self._failed_at[vm.id] = time.monotonic()
            self._tell(f"Error: {error.text}")
        finally:
            del self._leaving[vm.id]

    async def _go_on(self, vm: Vm) -> None:
        try:
            current = self._services.vm(vm.id)
            if sleeps(current):
                await (await self._host.get(vm.id)).start()
                self._tell(f"'{vm.name}' goes on: there is memory for it again.")
        except AtollError as error:
            self._failed_at[vm.id] = time.monotonic()
            self._tell(f"Error: {error.text}")
        finally:
            del self._coming[vm.id]

    # What is told

    def _tell_turn(self, room: Room, *, lasted: float) -> None:
        data: dict[str, object] = {"available": room.available, "reserve": room.reserve}
        shown = f"{format_size(room.available)} available, {format_size(room.reserve)} to be kept"
        if self._state.low:
            self._tell(f"Memory is low: {shown}.")
            kind = "host.memory-low"
        else:
            self._tell(f"Memory is there again: {shown}.")
            kind = "host.memory-relieved"
            data["seconds"] = round(lasted, 1)
        # A full disk mustn't keep it from what it does.
        with contextlib.suppress(AtollError):
            self._services.records.add_event(kind, data=data, durable=False)

    def _publish(self, vms: list[Vm], running: list[Vm]) -> None:
        """The figures for whoever asks."""
        held, used = {}, {}
        for vm in running:
            reading = self._readings.get(vm.id)
            if reading is None:
                continue
            if reading.given is not None and reading.given < vm.spec.memory:
                held[vm.id] = vm.spec.memory - reading.given
            if reading.used is not None:
                used[vm.id] = reading.used
        asleep = sum(sleeps(vm) for vm in vms)
        self._figures = Figures(reserve=self._reserve, low=self._state.low, held=held, used=used, asleep=asleep)
        self._services.pressure = self._figures


def sleeps(vm: Vm) -> bool:
    """Whether it was suspended since memory was short."""
    return vm.sleeps and vm.suspended_because == "memory"
