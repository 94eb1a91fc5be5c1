"""The computer's memory gets short: balloons act first, then VMs sleep, and nothing is lost."""

import asyncio
import contextlib
import mmap
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tests.helpers.agents import agent
from tests.helpers.api_client import api
from tests.helpers.machines import Factory, Machine

from atoll.errors import InvalidInput
from atoll.host import facts
from atoll.layout import Layout
from atoll.model.requests import SetRequest
from atoll.model.state import Phase
from atoll.model.vm import Event
from atoll.operations import balloon
from atoll.qemu import devices

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]
MIB = 1 << 20
ALL_OF_IT = str(facts.memory().total)
"""A reserve that no computer has available."""


async def given_to(vm: Machine) -> int:
    """What the balloon leaves the guest."""
    async with asyncio.timeout(60):
        # An agent that asks it at this moment holds its lock.
        while vm.record.id not in (readings := await balloon.ask_all(vm._services, [vm.record], interval=0)):
            await asyncio.sleep(0.1)
    given = readings[vm.record.id].given
    assert given is not None
    return given


async def becomes(vm: Machine, holds: Callable[[int], bool]) -> int:
    """Until the balloon is so. QEMU has no event for each of its moves that nobody else would miss."""
    async with asyncio.timeout(60):
        while not holds(given := await given_to(vm)):
            await asyncio.sleep(0.2)
    return given


async def told(client: httpx.AsyncClient, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Until the agent tells that of the computer's memory."""
    async with asyncio.timeout(30):
        while not holds(memory := (await client.get("/v1/memory")).json()):
            await asyncio.sleep(0.2)
    return memory  # type: ignore[no-any-return]


def used_in(metrics: str) -> float:
    """Bytes that the only VM's guest needs."""
    told = (line for line in metrics.splitlines() if line.startswith("atoll_vm_memory_guest_used_bytes{"))
    return float(next(told, "0").split()[-1])


async def test_a_balloon_leaves_the_floor_and_the_next_agent_gives_it_back(factory: Factory) -> None:
    vm = await factory.run("tiny", name="web", memory="384MiB", memory_min="256MiB")
    with pytest.raises(InvalidInput, match="--memory-min"):
        await vm.set(SetRequest(memory_min="400MiB"))
    with pytest.raises(InvalidInput, match="--memory-min"):
        await vm.set(SetRequest(memory="200MiB"))
    await vm.set(SetRequest(memory="352MiB"))
    await becomes(vm, lambda given: given <= 353 * MIB)
    layout = factory.layout
    async with agent(layout, "--memory-reserve", ALL_OF_IT, "--on-memory-pressure", "balloon") as served:
        assert await becomes(vm, lambda given: given <= 257 * MIB) >= 256 * MIB
        async with api(layout) as client:
            await told(client, lambda memory: memory["low"] and 125 * MIB < memory["held_back"] <= 128 * MIB)
            text = (await client.get("/metrics")).text
            assert "atoll_host_memory_low 1" in text
            # What the guest said is of a moment before the balloon grew, at first.
            async with asyncio.timeout(60):
                while not 10 * MIB < used_in(text) < 256 * MIB:
                    await asyncio.sleep(0.5)
                    text = (await client.get("/metrics")).text
        await served.end(signal.SIGKILL)
    assert await given_to(vm) < 258 * MIB
    async with agent(layout, "--memory-reserve", "0"):
        assert await becomes(vm, lambda given: given > 351 * MIB) <= 352 * MIB, "what its user lets it have"
    assert [event.kind async for event in factory.host.events(follow=False, after=0)].count("host.memory-low") == 1


@pytest.mark.slow
async def test_memory_that_was_saved_before_balloons_deflated_is_loaded(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_before(spec: object) -> list[devices.Properties]:
        found = today(spec)  # type: ignore[arg-type]
        return [{name: value for name, value in each.items() if name != "deflate-on-oom"} for each in found]

    today = devices.common_devices
    monkeypatch.setattr(devices, "common_devices", as_before)
    vm = await factory.run("tiny", name="v", memory="128MiB")
    assert "deflate-on-oom" not in factory.layout.vm(vm.record.id).command_line.read_text()
    await vm.sh("echo kept > /dev/shm/file")
    await vm.snapshot("old")
    await vm.suspend()
    monkeypatch.undo()
    await vm.start()
    assert "deflate-on-oom" in factory.layout.vm(vm.record.id).command_line.read_text()
    assert await vm.sh("cat /dev/shm/file") == "kept"
    (fork,) = await factory.host.fork("v@old", 1)
    assert (await fork.exec(["cat", "/dev/shm/file"])).text == "kept"
    both = [vm.record, factory.machine(fork).record]
    readings = await balloon.ask_all(vm._services, both, interval=0)
    assert [readings[each.id].mapped for each in both] == [False, True], "a fork's balloon frees nothing"
    await vm.set(SetRequest(memory="100MiB"))
    await becomes(vm, lambda given: given <= 101 * MIB)


CROWD, EACH = 4, 160 * MIB
"""VMs, and what each of them wants at once."""
SLACK, BALLAST = 320 * MIB, 2500 * MIB
"""What is available above the reserve before, and what the test itself gives back in the end."""
ALLOWED = 640 * MIB
"""How far below the reserve the computer may come for a moment: the margin at which VMs are suspended at once (188 MiB
of 23.5 GiB), and what guests take until that is seen, also while there is no agent at all.
"""
FILL = (
    "(for turn in $(seq 16); do dd if=/dev/urandom bs=1M count=10 2>/dev/null; sleep 1; done"
    " | tee /dev/shm/data | md5sum > /dev/shm/sum; touch /dev/shm/done) >/dev/null 2>&1 &"
)


class Watched:
    """What a bystander sees of the computer's memory and of the agent's figures."""

    def __init__(self) -> None:
        self.least_available = facts.memory().available
        self.held_at: float | None = None
        self.most_held = self.most_asleep = 0

    async def watch(self, layout: Layout) -> None:
        async with api(layout) as client:
            while True:
                self.least_available = min(self.least_available, facts.memory().available)
                with contextlib.suppress(httpx.HTTPError):
                    memory = (await client.get("/v1/memory")).json()
                    if memory["held_back"] > 8 * MIB and self.held_at is None:
                        self.held_at = time.time()
                    self.most_held = max(self.most_held, memory["held_back"])
                    self.most_asleep = max(self.most_asleep, memory["asleep"])
                await asyncio.sleep(0.2)


async def happened(factory: Factory, kind: str, *, after: int = 0, seconds: float = 300) -> Event:
    async with asyncio.timeout(seconds), contextlib.aclosing(factory.host.events(after=after)) as events:  # type: ignore[type-var]
        async for event in events:
            if event.kind == kind:
                return event
    raise AssertionError(f"there was no {kind}")


async def all_go_on(crowd: list[Machine]) -> None:
    async with asyncio.timeout(300):
        for vm in crowd:
            while await vm.phase() is not Phase.RUNNING:
                await asyncio.sleep(0.5)


@pytest.mark.slow
async def test_an_agent_that_is_ended_lets_a_suspension_come_to_its_end(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="384MiB")
    records = factory.host.services.records
    async with agent(factory.layout, "--memory-reserve", ALL_OF_IT) as served:
        async with asyncio.timeout(60):
            while not (working := records.operations(unfinished=True)):
                await asyncio.sleep(0.005)
        assert [each.verb for each in working] == ["suspend"]
        assert await served.end() == 0
    assert records.operations(unfinished=True) == []
    assert await vm.phase() is Phase.SUSPENDED
    assert vm.record.suspended_because == "memory"
    async with agent(factory.layout, "--memory-reserve", "0"):
        await all_go_on([vm])
        assert await vm.sh("echo well") == "well"


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_when_all_want_their_memory_at_once_the_computer_keeps_its_reserve_and_no_vm_is_lost(
    factory: Factory, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = factory.layout
    first = await factory.create("tiny", name="v0", memory="384MiB", on_memory_pressure="balloon")
    await first.start(wait=True, timeout=600)
    crowd = [first, *map(factory.machine, await first.fork(CROWD - 1, name="v{n}"))]
    for vm in crowd[1:]:
        # A fork's memory is the first one's until it writes it; now each has its own, as VMs that have booted do.
        await vm.suspend()
        await vm.start()
    boots = [await vm.read("/proc/sys/kernel/random/boot_id") for vm in crowd]
    ballast = mmap.mmap(-1, BALLAST)
    for offset in range(0, BALLAST, mmap.PAGESIZE):
        ballast[offset] = 1
    now = await factory.host.memory()
    assert now.promised >= 2 * now.used, "they use less than half of what they were promised"
    reserve = now.available - SLACK
    begun = factory.host.services.records.last_event()
    options = ("--memory-reserve", str(reserve))
    watched = Watched()
    watching = asyncio.create_task(watched.watch(layout))
    async with agent(layout, *options) as served:
        await asyncio.sleep(5)
        assert not [e.kind async for e in factory.host.events(follow=False, after=0) if e.kind == "host.memory-low"]
        assert [vm.record.run is not None for vm in crowd] == [True] * CROWD
        for vm in crowd:
            await vm.sh(FILL)
        suspended = await happened(factory, "vm.suspended", after=begun)
        assert suspended.data == {"reason": "memory"}
        await served.end(signal.SIGKILL)
    async with agent(layout, *options):
        await asyncio.sleep(30)
        assert watched.most_asleep >= 1
        asleep = [vm.record.name for vm in crowd if vm.record.suspended is not None]
        assert asleep and "v0" not in asleep, "it is never suspended"
        ballast.close()
        await happened(factory, "host.memory-relieved", after=suspended.id)
        await all_go_on(crowd)
        for vm in crowd:
            async with asyncio.timeout(600):
                while (await vm.exec(["test", "-e", "/dev/shm/done"])).exit_code:
                    await asyncio.sleep(1)
        await all_go_on(crowd)
        for vm, boot in zip(crowd, boots, strict=True):
            assert await vm.sh("stat -c %s /dev/shm/data") == str(EACH)
            assert await vm.sh("md5sum < /dev/shm/data") == await vm.read("/dev/shm/sum")
            assert await vm.read("/proc/sys/kernel/random/boot_id") == boot, "it is the same run of the guest"
            await becomes(vm, lambda given: given >= 383 * MIB)
    watching.cancel()
    events = [event async for event in factory.host.events(follow=False, after=begun)]
    slept = [event.name for event in events if event.kind == "vm.suspended"]
    short = (reserve - watched.least_available) // MIB
    print(f"{short} MiB below the reserve, {watched.most_held // MIB} MiB held back, {slept} suspended")
    assert watched.held_at is not None and watched.held_at < suspended.at + 1.5, "balloons come first"
    assert watched.least_available > reserve - ALLOWED
    assert not [event for event in events if event.kind in ("vm.ended", "vm.panicked", "vm.removed")]
    said = capfd.readouterr().err
    for each in ("Memory is low", "is suspended: the computer's memory is short", "goes on: there is memory"):
        assert each in said
