"""QEMU dies, hangs, or its guest does: what is told afterwards is what happened."""

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from msgspec.structs import replace
from tests.helpers.machines import Factory, Machine
from tests.helpers.world import disagreements

from atoll.errors import EngineFailed, WrongState
from atoll.host import facts
from atoll.host.watch import wait_for_exit
from atoll.model.state import Phase
from atoll.model.vm import Exit
from atoll.operations.services import Services

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]


async def ended(vm: Machine) -> Exit:
    info = await vm.info()
    assert info.phase is Phase.STOPPED
    assert info.exit is not None
    assert info.vm.run is None, "the end was recorded"
    return info.exit


async def test_a_killed_qemu_is_told_with_the_guests_last_lines(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo the last thing it said > /dev/ttyS0")
    await vm.wait(text="the last thing it said", timeout=30)
    pid = vm.pid
    os.kill(pid, signal.SIGKILL)
    await wait_for_exit(pid)
    exit = await ended(vm)
    assert exit.reason == "killed"
    assert "SIGKILL" in exit.detail
    assert "the last thing it said" in exit.last_lines
    with pytest.raises(WrongState, match="it is stopped"):
        await vm.exec(["true"])
    await vm.start(wait=True, timeout=120)
    assert (await vm.info()).exit is None
    assert await disagreements(factory.layout) == []


async def test_a_qemu_that_was_asked_to_end_by_a_signal_says_who_sent_it(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    pid = vm.pid
    os.kill(pid, signal.SIGTERM)
    await wait_for_exit(pid)
    exit = await ended(vm)
    assert exit.reason == "killed"
    assert "terminating on signal 15" in exit.detail


@pytest.mark.slow
async def test_a_guest_that_powers_off_is_stopped_and_one_that_reboots_goes_on(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    boot = await vm.read("/proc/sys/kernel/random/boot_id")
    pid = vm.pid
    await vm.sh("(sleep 0.2; reboot -f) > /dev/null 2>&1 &")
    await vm.reported("RESET")
    await vm.wait("ready", timeout=120)
    assert await vm.read("/proc/sys/kernel/random/boot_id") != boot
    assert vm.pid == pid and await vm.phase() is Phase.RUNNING
    await vm.sh("(sleep 0.2; poweroff -f) > /dev/null 2>&1 &")
    await vm.wait("stopped", timeout=60)
    exit = await ended(vm)
    assert (exit.reason, exit.detail) == ("guest-shutdown", "the guest powered itself off")


async def test_a_guest_whose_kernel_panics_is_crashed_until_it_is_stopped(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("modprobe pvpanic_pci")
    await vm.sh("echo 1 > /proc/sys/kernel/sysrq; (sleep 0.2; echo c > /proc/sysrq-trigger) > /dev/null 2>&1 &")
    await vm.wait(text="Kernel panic", timeout=60)
    await vm.reported("GUEST_PANICKED")
    assert await vm.phase() is Phase.CRASHED
    with pytest.raises(WrongState, match="it is crashed"):
        await vm.exec(["true"])
    async with asyncio.timeout(20):
        await vm.stop()
    exit = await ended(vm)
    assert exit.reason == "guest-panic"
    assert "Kernel panic" in exit.last_lines
    await vm.start(wait=True, timeout=120)


@pytest.fixture
def thawed() -> Iterator[list[int]]:
    """Processes that the test freezes; they go on at its end, so that they can be ended."""
    frozen: list[int] = []
    yield frozen
    for pid in frozen:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue


async def test_a_qemu_that_hangs_is_unknown_not_stopped_and_can_be_forced(factory: Factory, thawed: list[int]) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    pid = vm.pid
    thawed.append(pid)
    os.kill(pid, signal.SIGSTOP)
    (info,) = await factory.host.ls()
    assert info.phase is Phase.UNKNOWN
    for verb in (vm.pause, vm.start, vm.rm):
        with pytest.raises(WrongState, match="it is unknown"):
            await verb()
    assert facts.is_alive(vm.record.run)
    await asyncio.wait_for(vm.stop(force=True), 30)
    assert facts.identity_of(pid) is None
    exit = await ended(vm)
    assert (exit.reason, exit.detail) == ("stopped", "forced")
    await vm.start(wait=True, timeout=120)


async def test_a_qemu_that_hung_for_a_while_is_running_again(factory: Factory, thawed: list[int]) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    thawed.append(vm.pid)
    os.kill(vm.pid, signal.SIGSTOP)
    assert await vm.phase() is Phase.UNKNOWN
    # A list doesn't wait long for one that was silent before.
    assert factory.host.services.silent == {vm.id}
    assert [info.phase for info in await factory.host.ls()] == [Phase.UNKNOWN]
    os.kill(vm.pid, signal.SIGCONT)
    assert await vm.phase() is Phase.RUNNING
    assert factory.host.services.silent == set()
    assert [info.phase for info in await factory.host.ls()] == [Phase.RUNNING]
    assert await vm.sh("echo well") == "well"


async def test_a_qemu_that_dies_at_its_start_says_why_and_leaves_nothing(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    head = factory.layout.vm(vm.id).head(vm.record.spec.disks[0])
    content = head.read_bytes()
    head.write_bytes(b"no qcow2 at all" * 100)
    with pytest.raises(EngineFailed, match=r"v: QEMU ended at its start: .*qcow2"):
        await vm.start()
    assert await vm.phase() is Phase.STOPPED
    assert await disagreements(factory.layout) == []
    head.write_bytes(content)
    await vm.start(wait=True, timeout=120)


async def test_after_the_host_was_restarted_the_vm_is_stopped_and_says_so(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    pid, record = vm.pid, vm.record
    os.kill(pid, signal.SIGKILL)
    await wait_for_exit(pid)
    services = Services(factory.layout)
    try:
        # As after a power cut: another boot, another process with that pid, and /run is empty.
        assert record.run is not None
        lost = replace(record.run, boot_id="11111111-2222-3333-4444-555555555555", pid=os.getpid())
        services.records.put_vm(replace(record, run=lost))
    finally:
        services.close()
    shutil.rmtree(factory.layout.run)
    exit = await ended(vm)
    assert exit.reason == "host-rebooted"
    await vm.start(wait=True, timeout=120)
    assert await disagreements(factory.layout) == []


@pytest.mark.slow
async def test_a_lost_runtime_folder_makes_a_vm_unknown_and_stoppable(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    shutil.rmtree(factory.layout.run)
    assert await vm.phase() is Phase.UNKNOWN
    with pytest.raises(WrongState, match="it is unknown"):
        await vm.start()
    await asyncio.wait_for(vm.stop(force=True), 40)
    await vm.start(wait=True, timeout=120)
    assert await disagreements(factory.layout) == []
