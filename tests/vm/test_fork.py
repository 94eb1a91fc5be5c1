"""Running copies of one instant, and machines that sleep on the disk."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.machines import Factory
from tests.helpers.ports import free_port
from tests.helpers.root import small_file_system
from tests.helpers.world import disagreements

from atoll.errors import AlreadyExists, EngineFailed, InvalidInput, NotFound, WrongState
from atoll.host import facts
from atoll.layout import Layout
from atoll.model.requests import DiskRequest, SetRequest
from atoll.model.spec import PortSpec
from atoll.model.state import Phase
from atoll.operations import boot, template
from atoll.operations.descriptors import Access
from atoll.qemu import jobs
from atoll.qemu.guest import Agent, Refused
from atoll.qemu.monitor import Monitor

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

MIB = 1024**2


async def test_copies_go_on_from_one_instant_and_share_its_memory(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="128MiB", ports=(PortSpec(host_port=free_port(), guest_port=80),))
    await vm.sh(
        "dd if=/dev/urandom of=/tmp/big bs=1M count=32 2>/dev/null; echo kept > /tmp/in-memory; echo x > /root/f"
    )
    content = await vm.sh("sha256sum /tmp/big")
    copies = [factory.machine(copy) for copy in await vm.fork(3)]
    assert [copy.name for copy in copies] == ["v-1", "v-2", "v-3"]
    assert not list(factory.layout.memory.glob("*")), "what was taken for the copies is gone"
    assert not factory.layout.templates.exists()
    assert await vm.history() == []
    numbers = set()
    for copy in copies:
        assert await copy.phase() is Phase.RUNNING
        assert await copy.read("/tmp/in-memory") == "kept"
        assert await copy.sh("sha256sum /tmp/big") == content
        await copy.sh(f"echo {copy.name} > /root/f; sync")
        numbers.add(await copy.sh("head -c 16 /dev/urandom | sha256sum"))
    assert len(numbers) == 3, "each has random numbers of its own"
    assert await vm.read("/root/f") == "x"
    for copy in copies:
        assert await copy.read("/root/f") == copy.name
        assert facts.memory_private(copy.pid) < 110 * MIB
    assert await disagreements(factory.layout) == []


async def test_a_copy_is_a_vm_like_any(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo one > /tmp/in-memory")
    (copy,) = [factory.machine(each) for each in await vm.fork(name="copy")]
    await vm.rm(force=True)
    await copy.sh("echo two > /tmp/in-memory; echo two > /root/f; sync")
    node = await copy.snapshot("here")
    assert node.memory is not None
    await copy.sh("echo three > /tmp/in-memory")
    (grandchild,) = [factory.machine(each) for each in await copy.fork(name="grandchild")]
    assert await grandchild.read("/tmp/in-memory") == "three"
    await copy.restore("here")
    assert await copy.read("/tmp/in-memory") == "two"
    (past,) = [factory.machine(each) for each in await factory.host.fork("copy@here", name="past")]
    assert await past.read("/tmp/in-memory") == "two"
    await copy.restart()
    await copy.wait("ready", timeout=120)
    assert await copy.read("/root/f") == "two"
    await grandchild.stop()
    await grandchild.start(wait=True, timeout=120)
    assert await grandchild.read("/root/f") == "two"
    assert await disagreements(factory.layout) == []


async def test_what_cannot_be_forked_is_told(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v")
    with pytest.raises(WrongState, match="no memory to go on from"):
        await vm.fork()
    await vm.snapshot("s")
    with pytest.raises(WrongState, match="no memory to go on from"):
        await factory.host.fork("v@s")
    with pytest.raises(InvalidInput, match="one name for 2 copies"):
        await vm.fork(2, name="x")
    with pytest.raises(InvalidInput, match="0 copies"):
        await vm.fork(0)
    assert [info.vm.name for info in await factory.host.ls()] == ["v"]
    assert await disagreements(factory.layout) == []


async def test_a_suspended_vm_goes_on_from_where_it_was(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo kept > /tmp/in-memory")
    boot = await vm.read("/proc/sys/kernel/random/boot_id")
    await vm.suspend()
    await vm.suspend()
    assert await vm.phase() is Phase.SUSPENDED
    assert vm.record.run is None
    with pytest.raises(WrongState, match="it is suspended"):
        await vm.disk_add(DiskRequest(size="8MiB"))
    with pytest.raises(WrongState, match=r"it is suspended\. Let it go on with `atoll resume v`"):
        await vm.exec(["true"])
    (change,) = await vm.set(SetRequest(memory="128MiB"))
    assert change.when == "next-start"
    await vm.resume()
    await vm.wait("ready", timeout=60)
    assert await vm.read("/tmp/in-memory") == "kept"
    assert await vm.read("/proc/sys/kernel/random/boot_id") == boot
    assert vm.record.spec.memory == 96 * MIB
    await vm.suspend()
    await vm.stop()
    assert await vm.phase() is Phase.STOPPED
    assert not list(factory.layout.memory.iterdir())
    await vm.start(wait=True, timeout=120)
    assert vm.record.spec.memory == 128 * MIB
    await vm.suspend()
    await vm.rm()
    assert not list(factory.layout.memory.iterdir())
    assert await disagreements(factory.layout) == []


async def test_a_paused_vm_is_suspended_paused(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.pause()
    await vm.suspend()
    await vm.start()
    assert await vm.phase() is Phase.PAUSED
    await vm.resume()
    assert await vm.sh("echo well") == "well"


async def test_a_pool_has_copies_that_wait(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo kept > /tmp/in-memory")
    await vm.snapshot("clean")
    assert await factory.host.pools.fill("v@clean", 2) == 2
    assert await factory.host.pools.fill("v@clean", 2) == 0
    (pool,) = await factory.host.pools.ls()
    assert (pool.name, len(pool.ready)) == ("v@clean", 2)
    taken = factory.machine(await factory.host.pools.take("v@clean", "one"))
    assert await taken.phase() is Phase.RUNNING
    assert await taken.read("/tmp/in-memory") == "kept"
    with pytest.raises(AlreadyExists, match="there is a VM 'one' already"):
        await factory.host.pools.take("v@clean", "one")
    os.kill(factory.machine(await factory.host.get(pool.ready[-1])).pid, signal.SIGKILL)
    with pytest.raises(NotFound, match="no copy of v@clean waits"):
        await factory.host.pools.take("v@clean", "two")
    assert await factory.host.pools.fill("v@clean", 1) == 1
    assert await factory.host.pools.rm("v@clean") == 1
    assert await factory.host.pools.ls() == []
    assert sorted(info.vm.name for info in await factory.host.ls()) == ["one", "v"]
    assert await disagreements(factory.layout) == []


async def test_copies_are_removed_at_the_end_of_their_context(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    async with await vm.fork(3) as forks:
        assert [fork.name for fork in forks] == ["v-1", "v-2", "v-3"]
        await forks[1].rm(force=True)
    assert [info.vm.name for info in await factory.host.ls()] == ["v"]


async def test_a_guest_that_goes_on_knows_the_time_and_a_copy_knows_its_name(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("date -s '2001-01-01 00:00:00'; echo 0123456789abcdef0123456789abcdef > /etc/machine-id; sync")
    await vm.snapshot("past")
    await vm.restore("past")
    assert abs(int(await vm.sh("date +%s")) - time.time()) < 30
    (fork,) = await factory.host.fork("v@past", name="copy")
    copy = factory.machine(fork)
    assert abs(int(await copy.sh("date +%s")) - time.time()) < 30
    assert await copy.sh("hostname; cat /etc/hostname") == "copy\ncopy"
    identity = await copy.read("/etc/machine-id")
    assert len(identity) == 32 and identity != "0123456789abcdef0123456789abcdef"
    assert await vm.read("/etc/machine-id") == "0123456789abcdef0123456789abcdef"
    assert await vm.sh("hostname") == "v"

    clone = factory.machine(await vm.clone("clone"))
    await clone.start(wait=True, timeout=120)
    assert await clone.sh("hostname; cat /etc/hostname") == "clone\nclone"
    assert await clone.read("/etc/machine-id") not in (identity, await vm.read("/etc/machine-id"))
    await factory.host.pools.fill("v@past", 1)
    taken = factory.machine(await factory.host.pools.take("v@past", "taken"))
    assert await taken.sh("hostname") == "taken"


@pytest.mark.slow
async def test_the_generator_of_random_numbers_differs_in_each_copy(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.snapshot("one")
    read = "head -c16 /dev/urandom | od -An -tx1"
    seen = set()
    for _ in range(2):
        await vm.restore("one")
        seen.add(await vm.sh(read))
    seen |= {await factory.machine(fork).sh(read) for fork in await factory.host.fork("v@one", 3)}
    assert len(seen) == 5


@pytest.mark.slow
async def test_templates_go_when_memory_is_scarce_and_are_made_again(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo here > /dev/shm/memory")
    await vm.snapshot("one")
    templates = factory.layout.templates
    await factory.host.fork("v@one", name="first")
    assert any(templates.iterdir())
    await vm.stop(force=True)
    with monkeypatch.context() as patch:
        patch.setattr(facts, "memory", lambda: facts.Memory(total=100 * 2**30, available=2**30))
        await vm.start(wait=True, timeout=120)
        assert not any(templates.iterdir())
    (again,) = await factory.host.fork("v@one", name="second")
    for fork in (again, await factory.host.get("first")):
        assert await factory.machine(fork).read("/dev/shm/memory") == "here"


@pytest.fixture
def small_shared_memory(layout: Layout) -> Iterator[Path]:
    """The folder for templates on a file system of its own that holds less than a guest's memory, and is thought to
    have room: as when others fill it meanwhile.
    """
    layout.templates.mkdir(mode=0o700)
    try:
        with small_file_system(layout.templates, size="8m", mode="700"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(template, "RESERVE", -1000)
            yield layout.templates
    finally:
        layout.templates.rmdir()


async def test_shared_memory_that_is_full_is_done_without(factory: Factory, small_shared_memory: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo here > /dev/shm/memory")
    await vm.snapshot("one")
    (fork,) = await factory.host.fork("v@one", name="fork")
    assert await factory.machine(fork).read("/dev/shm/memory") == "here"
    await vm.sh("echo later > /dev/shm/memory")
    (other,) = await vm.fork(1, name="other")
    assert await factory.machine(other).read("/dev/shm/memory") == "later"
    assert not [path for path in small_shared_memory.iterdir() if path.stat().st_size > MIB]
    assert await disagreements(factory.layout) == []


async def test_a_copy_whose_qemu_dies_while_it_loads_takes_the_others_with_it(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them or none; and the source never knows."""
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo here > /dev/shm/memory")
    hand_over = boot.hand_over

    async def dies(monitor: Monitor, path: object, access: Access, *, name: str) -> int:
        (victim,) = [info.vm for info in await factory.host.ls() if info.vm.name == "fork-2"] or [None]
        for pid in boot.engines_of(victim) if victim is not None else ():
            os.kill(pid, signal.SIGKILL)
        return await hand_over(monitor, path, access, name=name)

    with monkeypatch.context() as patch:
        patch.setattr(boot, "hand_over", dies)
        with pytest.raises(EngineFailed):
            await vm.fork(3, name="fork-{n}")
    assert {info.vm.name for info in await factory.host.ls()} == {"v"}
    assert not factory.layout.templates.exists()
    assert await vm.read("/dev/shm/memory") == "here"
    assert await disagreements(factory.layout) == []
    forks = await vm.fork(3, name="fork-{n}")
    assert [await factory.machine(fork).read("/dev/shm/memory") for fork in forks] == ["here"] * 3


@pytest.mark.slow
async def test_a_qemu_that_saves_plain_streams_can_do_the_same(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU before 9.0 has no mapped-ram: its memory files are loaded whole."""

    async def known(monitor: Monitor) -> set[str]:
        return {"background-snapshot", "events"}

    monkeypatch.setattr(jobs, "known", known)
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo here > /dev/shm/memory")
    await vm.snapshot("one")
    await vm.sh("echo changed > /dev/shm/memory")
    (fork,) = await factory.host.fork("v@one", name="fork")
    assert await factory.machine(fork).read("/dev/shm/memory") == "here"
    (twin,) = await vm.fork(1, name="twin")
    assert await factory.machine(twin).read("/dev/shm/memory") == "changed"
    await vm.restore("one")
    assert await vm.read("/dev/shm/memory") == "here"
    await vm.suspend()
    await vm.resume()
    assert await vm.read("/dev/shm/memory") == "here"
    assert await disagreements(factory.layout) == []


async def test_an_agent_that_will_not_set_the_clock_has_it_set_by_a_command(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to QEMU 9 it does so only where there is /sbin/hwclock."""

    async def refuse(agent: Agent, nanoseconds: int | None = None) -> None:
        raise Refused("the guest agent refused guest-set-time", "this command is not currently supported")

    monkeypatch.setattr(Agent, "set_time", refuse)
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("date -s '2001-01-01 00:00:00'")
    await vm.snapshot("past")
    await vm.restore("past")
    assert abs(int(await vm.sh("date +%s")) - time.time()) < 30
