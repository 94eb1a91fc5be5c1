"""Memory that a guest doesn't use any more is the computer's again, by itself."""

import asyncio

import pytest
from tests.helpers.agents import agent
from tests.helpers.command import atoll
from tests.helpers.images import adopt_cached
from tests.helpers.machines import Factory

from atoll.errors import Busy
from atoll.host import facts
from atoll.layout import Layout
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]
MIB = 1 << 20


def resident(vm: Vm) -> int:
    assert vm.run is not None
    return facts.memory_resident(vm.run.pid)


async def test_what_a_guest_frees_goes_back_to_the_computer(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="384MiB")
    before = resident(vm.record)
    await vm.sh("dd if=/dev/urandom of=/dev/shm/big bs=1M count=160 2>/dev/null")
    full = resident(vm.record)
    assert full > before + 150 * MIB
    await vm.sh("rm /dev/shm/big")
    async with asyncio.timeout(60):
        # Linux reports blocks of free pages every two seconds.
        while resident(vm.record) > full - 120 * MIB:
            await asyncio.sleep(0.5)
    assert await vm.sh("echo alive") == "alive"


async def test_the_host_tells_what_was_promised_and_what_is_shared(factory: Factory) -> None:
    assert (await factory.host.memory()).vms == 0
    vm = await factory.run("tiny", name="v", memory="128MiB")
    alone = await factory.host.memory()
    assert (alone.vms, alone.promised) == (1, 128 * MIB)
    assert 20 * MIB < alone.used < 400 * MIB
    assert alone.available < alone.total
    await vm.fork(3, name="f-{n}")
    four = await factory.host.memory()
    assert (four.vms, four.promised) == (4, 512 * MIB)
    assert four.shared > 5 * MIB
    assert four.saved > alone.saved + 20 * MIB
    assert 4 * MIB < four.used < 4 * alone.used
    shown = await asyncio.to_thread(atoll, "top", "--host", "--once")
    assert shown.out.split()[:2] == ["VMS", "PROMISED"]
    assert "512MiB" in shown.out


async def test_an_agent_promises_no_more_than_it_may(layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    total = facts.memory().total
    options = ("--memory-overcommit", "1.5", "--memory-reserve", str(total - 200 * MIB))
    # So much is never available, and the agent would make room.
    options += ("--on-memory-pressure", "nothing")
    place = Place(url="http://atoll", socket=str(layout.agent_socket))
    async with agent(layout, *options), RemoteHost(place) as host:
        first = await host.run("tiny", name="first", memory="128MiB")
        two = [await host.create("tiny", name=name, memory="128MiB") for name in ("second", "third")]
        started = await asyncio.gather(*(each.start() for each in two), return_exceptions=True)
        (refused,) = [each for each in started if each is not None]
        assert isinstance(refused, Busy)
        assert "2 other VMs have been promised 256MiB of 300MiB" in refused.why
        assert [each.phase for each in await host.ls()].count(Phase.STOPPED) == 1
        await first.restart(force=True)
        await first.stop(force=True)
        late = two[started.index(refused)]
        await late.start()
        assert (await host.memory()).promised == 256 * MIB
        for each in (first, *two):
            await each.rm(force=True)
