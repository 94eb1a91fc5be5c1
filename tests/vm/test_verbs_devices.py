"""Changing a real VM: CPUs, memory, disks and ports, while it runs and for its next start."""

import asyncio
import socket
import time

import pytest
from tests.helpers.machines import Factory, Machine
from tests.helpers.ports import free_port
from tests.helpers.world import disagreements

from atoll.errors import AlreadyExists, InvalidInput, NotFound
from atoll.model.requests import DiskRequest, SetRequest
from atoll.model.spec import PortSpec
from atoll.model.vm import Change
from atoll.operations.guest_agent import exchange

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

MIB = 1024**2


def told(changes: list[Change]) -> list[tuple[str, str, str]]:
    return [(change.name, change.value, change.when) for change in changes]


async def until(vm: Machine, script: str, *, seconds: float = 30) -> None:
    """Let the guest itself wait until the shell line succeeds."""
    await vm.sh(f"i=0; until {script}; do i=$((i+1)); [ $i -lt {int(seconds * 5)} ] || exit 1; usleep 200000; done")


async def test_cpus_that_are_added_are_told_as_the_guest_has_them(factory: Factory) -> None:
    """Whether a kernel takes them is its own choice, and newer ones don't under emulation."""
    vm = await factory.run("tiny", name="v", memory="96MiB", cpus=1, max_cpus=2)
    (added,) = await vm.set(SetRequest(cpus=2))
    there = await vm.sh("ls -d /sys/devices/system/cpu/cpu[0-9] | wc -l")
    assert (added.name, added.value) == ("cpus", "2")
    assert (added.when, there) in (("now", "2"), ("next-start", "1")), added.why
    (more, most) = await vm.set(SetRequest(cpus=3))
    assert (more.name, more.when, more.why) == ("cpus", "next-start", "it was started for at most 2")
    assert (most.name, most.value, most.when) == ("max-cpus", "3", "next-start")
    if added.when == "now":
        (fewer, *_) = await vm.set(SetRequest(cpus=1))
        assert fewer.why == "a running guest keeps its CPUs"
        await vm.set(SetRequest(cpus=3))
    await vm.restart()
    await vm.wait("ready", timeout=120)
    assert await vm.sh("nproc") == "3"
    assert vm.record.pending is None


async def test_a_setting_that_is_taken_back_before_the_next_start_holds_now(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB", cpus=1, max_cpus=1)
    assert told(await vm.set(SetRequest(cpus=2)))[0] == ("cpus", "2", "next-start")
    changes = await vm.set(SetRequest(cpus=1, max_cpus=1))
    assert told(changes) == [("cpus", "1", "now"), ("max-cpus", "1", "now")]
    assert vm.record.pending is None


@pytest.mark.slow
async def test_a_guest_uses_the_cpus_that_it_takes(factory: Factory) -> None:
    vm = await factory.run("debian:12", name="v", cpus=1, max_cpus=2)
    (added,) = await vm.set(SetRequest(cpus=2))
    assert (added.when, await vm.sh("nproc")) in (("now", "2"), ("next-start", "1"))


async def test_memory_moves_with_the_balloon_and_grows_at_the_next_start(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="128MiB")
    # A guest that may take back what its balloon holds goes on counting it as its own, as used.
    before, free = map(int, (await vm.sh("free | awk '/Mem/ {print $2, $4}'")).split())
    (less,) = await vm.set(SetRequest(memory="100MiB"))
    assert told([less]) == [("memory", "100MiB", "now")]
    await until(vm, f"[ $(free | awk '/Mem/ {{print $4}}') -lt {free - 20_000} ]")
    (more,) = await vm.set(SetRequest(memory="160MiB"))
    assert told([more]) == [("memory", "160MiB", "next-start")]
    assert more.why == "it was started with 128MiB"
    await vm.restart()
    await vm.wait("ready", timeout=120)
    assert int(await vm.sh("free | awk '/Mem/ {print $2}'")) > before + 20_000


async def test_settings_of_a_stopped_vm_hold_at_once(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v")
    changes = await vm.set(SetRequest(cpus=2, memory="200MiB", display="vga", disk_size="2GiB"))
    assert told(changes) == [
        ("cpus", "2", "now"),
        ("memory", "200MiB", "now"),
        ("display", "vga", "now"),
        ("disk root", "2GiB", "now"),
    ]
    with pytest.raises(InvalidInput, match="disks only grow"):
        await vm.set(SetRequest(memory="300MiB", disk_size="1MiB"))
    assert vm.record.spec.memory == 200 * MIB


async def test_a_disk_is_added_used_grown_and_kept_over_a_restart(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    disk, change = await vm.disk_add(DiskRequest(size="16MiB"))
    assert (disk.name, change.when) == ("data1", "now")
    await until(vm, "[ -b /dev/vdb ]")
    assert await vm.read("/sys/block/vdb/serial") == "data1"
    await vm.sh("printf 'kept for good' | dd of=/dev/vdb bs=512 count=1 conv=sync,fsync 2>/dev/null")
    grown = await vm.disk_resize("data1", "32MiB")
    assert told([grown]) == [("disk data1", "32MiB", "now")]
    await until(vm, f'[ "$(cat /sys/block/vdb/size)" = {32 * MIB // 512} ]')
    second, _ = await vm.disk_add(DiskRequest(name="second", size="8MiB"))
    await until(vm, "[ -b /dev/vdc ]")
    await vm.restart()
    await vm.wait("ready", timeout=120)
    serials = "for d in /sys/block/vd?; do echo $(cat $d/serial) $(cat $d/size) ${d##*/}; done"
    there = {line.split()[0]: line.split()[1:] for line in (await vm.sh(serials)).splitlines()}
    assert int(there["data1"][0]) == 32 * MIB // 512
    assert int(there["second"][0]) == second.size // 512
    assert await vm.sh(f"head -c 13 /dev/{there['data1'][1]}") == "kept for good"
    assert await disagreements(factory.layout) == []


async def test_a_disk_goes_at_once_or_at_the_next_start_and_its_file_with_it(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=(DiskRequest(name="cold", size="8MiB"),))
    await vm.disk_add(DiskRequest(name="hot", size="8MiB"))
    await until(vm, "[ -b /dev/vdc ]")
    assert (await vm.disk_rm("hot")).when == "now"
    await until(vm, "[ ! -b /dev/vdc ]")
    paths = factory.layout.vm(vm.id)
    assert not list(paths.home.glob("hot.*"))
    # What it was started with can't be unplugged: it sits on the root bus.
    later = await vm.disk_rm("cold")
    assert later.when == "next-start" and later.why
    assert list(paths.home.glob("cold.*"))
    with pytest.raises(InvalidInput, match="there is a disk 'cold' already"):
        await vm.disk_add(DiskRequest(name="cold", size="8MiB"))
    with pytest.raises(NotFound, match="has no disk 'cold'"):
        await vm.disk_rm("cold")
    await vm.restart()
    assert not list(paths.home.glob("cold.*"))
    assert await disagreements(factory.layout) == []


async def test_wrong_disks_are_refused_and_change_nothing(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v")
    before = vm.record
    for request in (
        DiskRequest(name="root", size="8MiB"),
        DiskRequest(name="../x", size="8MiB"),
        DiskRequest(name="x", size="1TiB1"),
        DiskRequest(name="x"),
        DiskRequest(name="x", size=-1),
        DiskRequest(name="x", size="9" * 400),
    ):
        with pytest.raises(InvalidInput):
            await vm.disk_add(request)
    with pytest.raises(InvalidInput, match="disks only grow"):
        await vm.disk_resize("root", "2MiB")
    with pytest.raises(NotFound, match="its disks: root"):
        await vm.disk_resize("nosuch", "2MiB")
    assert vm.record == before
    assert await disagreements(factory.layout) == []


async def fetched(port: int, *, seconds: float = 20) -> bytes:
    """What the guest's web server answers through the published port."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), seconds)
    try:
        writer.write(b"GET /hello HTTP/1.0\r\n\r\n")
        return await asyncio.wait_for(reader.read(), seconds)
    finally:
        writer.close()


async def test_ports_are_published_listed_and_taken_back_while_it_runs(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("mkdir -p /www; echo from the guest > /www/hello; httpd -p 80 -h /www")
    await until(vm, "ip address show eth0 | grep -q 'inet '")
    port = PortSpec(host_port=free_port(), guest_port=80)
    await vm.publish(port)
    assert await vm.ports() == [port]
    assert b"from the guest" in await fetched(port.host_port)
    with pytest.raises(AlreadyExists, match=f"v publishes port {port.host_port} already"):
        await vm.publish(port)
    assert await vm.ports() == [port]
    assert b"from the guest" in await fetched(port.host_port)
    await vm.unpublish(port.host_port)
    assert await vm.ports() == []
    with pytest.raises(OSError):
        await fetched(port.host_port)
    with pytest.raises(NotFound, match=f"doesn't publish port {port.host_port}/tcp"):
        await vm.unpublish(port.host_port)


async def test_a_port_of_another_vm_or_program_is_told_with_its_holder(factory: Factory) -> None:
    port = PortSpec(host_port=free_port(), guest_port=80)
    await factory.create("tiny", name="api", ports=(port,))
    vm = await factory.run("tiny", name="v", memory="96MiB")
    with pytest.raises(AlreadyExists, match=f"port {port.host_port} is taken by 'api'"):
        await vm.publish(port)
    with pytest.raises(AlreadyExists, match="is taken by 'api'"):
        await factory.create("tiny", name="third", ports=(port,))
    with socket.create_server(("127.0.0.1", 0)) as program:
        taken = PortSpec(host_port=program.getsockname()[1], guest_port=80)
        with pytest.raises(AlreadyExists, match="stop the program that has it"):
            await vm.publish(taken)
    assert await vm.ports() == []
    assert [info.vm.name for info in await factory.host.ls()] == ["api", "v"]
    assert await disagreements(factory.layout) == []


async def test_a_vm_with_a_screen_shows_it_and_takes_keys(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="128MiB", display="vga")
    picture = await vm.screenshot()
    assert picture.startswith(b"\x89PNG") and len(picture) > 100
    # Linux writes key presses to the input device, 24 bytes for each press, release and synchronisation.
    await vm.sh("cat /dev/input/event* > /tmp/keys 2>/dev/null & echo started")
    await until(vm, "ls /dev/input/event*")
    await vm.type("aZ")
    await vm.key("ctrl-alt-f2", "ret")
    await until(vm, "[ $(wc -c < /tmp/keys) -ge 480 ]")
    with pytest.raises(InvalidInput, match="is no key"):
        await vm.key("nosuchkey")
    with pytest.raises(InvalidInput, match="can't be typed"):
        await vm.type("aß")


async def test_logs_and_stats_of_a_running_vm(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo first > /dev/ttyS0; echo second > /dev/ttyS0")
    await vm.wait(text="second", timeout=30)
    everything = b"".join([chunk async for chunk in vm.logs()])
    assert b"first" in everything
    last = b"".join([chunk async for chunk in vm.logs(tail=1)])
    assert b"second" in last and b"first" not in last
    before = await vm.stats()
    await vm.sh(
        "dd if=/dev/vda of=/dev/null bs=1M count=8 2>/dev/null; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"
    )
    after = await vm.stats()
    assert after.cpu_seconds > before.cpu_seconds
    assert after.disk_read >= before.disk_read
    assert after.memory_given == 96 * MIB and after.memory_resident > 30 * MIB
    assert after.at >= before.at and time.time() - after.at < 60
    assert [card.nic for card in after.cards] == ["net0"] and after.net_received is not None
    async with exchange(factory.layout.vm(vm.id), "v"):
        told = await vm.stats()
    assert (told.cards, told.net_received) == ((), None), "the guest's counters aren't waited for while others ask it"
    followed = asyncio.create_task(_all(vm))
    await vm.stop()
    assert b"second" in await asyncio.wait_for(followed, 30)


async def _all(vm: Machine) -> bytes:
    return b"".join([chunk async for chunk in vm.logs(follow=True)])
