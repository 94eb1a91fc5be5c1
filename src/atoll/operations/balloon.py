"""What a running VM's balloon leaves its guest, and what the guest says of its memory."""

import asyncio
import contextlib
import time
from collections.abc import Iterable

from msgspec import Struct

from atoll.errors import AtollError, EngineFailed, WrongState
from atoll.model.state import Phase, phase_of_run_state
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.power import control
from atoll.operations.services import Services

PATH = "/machine/peripheral/balloon"
RAM_PATH = "/objects/ram"
ANSWER_TIME = 5.0
"""Seconds; a computer without memory may be slow, too."""
AT_ONCE = 32
LOCK_TIME = 0.5
"""Seconds that a balloon waits for another operation on its VM."""
_FRESH = 5.0
_UNKNOWN = (1 << 64) - 1


class Reading(Struct, frozen=True, kw_only=True):
    """Of one VM, at one moment; bytes."""

    running: bool
    given: int | None = None
    """What the balloon leaves the guest; None when it has none that answers."""
    available: int | None = None
    """What its kernel could use without freeing anything; None when it hasn't said lately."""
    mapped: bool = False
    """Its memory is a file's until it writes it. QEMU frees no page of that (and says so of each in its log)."""

    @property
    def used(self) -> int | None:
        """What it needs, its kernel included."""
        if self.given is None or self.available is None:
            return None
        return max(0, self.given - self.available)


def most_of(vm: Vm) -> int:
    """What its user lets it have: `set --memory` takes memory away from one that runs."""
    return min(vm.spec.memory, (vm.pending or vm.spec).memory)


async def ask_all(services: Services, vms: Iterable[Vm], *, interval: int) -> dict[str, Reading]:
    """Those that answer, by their ids. Guests are asked every `interval` seconds from now on; 0 for not any more.

    What a guest says is what it answered before: with a new interval it is asked at once, but it takes its time.
    """
    # In a thread: see `observe.aside`.
    return await observe.aside(lambda: _ask_all(services, list(vms), interval))


async def _ask_all(services: Services, vms: list[Vm], interval: int) -> dict[str, Reading]:
    places = asyncio.Semaphore(AT_ONCE)
    found: dict[str, Reading] = {}

    async def one(vm: Vm) -> None:
        async with places:
            with contextlib.suppress(AtollError, OSError):
                found[vm.id] = await _ask(services, vm, interval)

    await asyncio.gather(*(one(vm) for vm in vms))
    return found


async def _ask(services: Services, vm: Vm, interval: int) -> Reading:
    """By the monitor of who holds the lock: on a busy computer this takes seconds, and whoever asks for the phase
    meanwhile would find the other monitor taken. Raises `Busy` when something else is done with the VM.
    """
    async with (
        services.lease(vm.id, what=f"the VM '{vm.name}'", timeout=0),
        control(services, vm) as monitor,
    ):
        status = await monitor.execute("query-status", timeout=ANSWER_TIME)
        running = phase_of_run_state(status["status"]) is Phase.RUNNING
        try:
            polling = {"path": PATH, "property": "guest-stats-polling-interval", "value": interval}
            await monitor.execute("qom-set", polling, timeout=ANSWER_TIME)
            balloon = await monitor.execute("query-balloon", timeout=ANSWER_TIME)
            said = await monitor.execute("qom-get", {"path": PATH, "property": "guest-stats"}, timeout=ANSWER_TIME)
        except EngineFailed:
            # It has no such device.
            return Reading(running=running)
        of_ram = await monitor.execute("qom-list", {"path": RAM_PATH}, timeout=ANSWER_TIME)
    available = said["stats"]["stat-available-memory"]
    known = available != _UNKNOWN and time.time() - said["last-update"] <= _FRESH
    return Reading(
        running=running,
        given=balloon["actual"],
        available=available if known else None,
        mapped=any(each["name"] == "mem-path" for each in of_ram),
    )


async def move(services: Services, vm: Vm, size: int) -> None:
    """Tell its balloon to leave it `size`, or what its user lets it have by now.

    Raises `Busy` when something else is done with the VM, `WrongState`, `EngineFailed`.
    """
    async with services.lease(vm.id, what=f"the VM '{vm.name}'", timeout=LOCK_TIME):
        current = services.vm(vm.id)
        if current.run != vm.run:
            raise WrongState(f"{vm.name}: it isn't the machine any more that was looked at")
        async with control(services, current) as monitor:
            await monitor.execute("balloon", {"value": min(size, most_of(current))})
