"""Memory that a guest doesn't use any more is the computer's again, by itself."""

import asyncio

import pytest
from tests.helpers.command import atoll
from tests.helpers.machines import Factory

from atoll.host import facts
from atoll.model.vm import Vm

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
