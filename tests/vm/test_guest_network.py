"""User-mode networks as a guest sees them, and the helpers behind them."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.helpers import leftovers, tool
from tests.helpers.machines import Factory, Machine
from tests.helpers.ports import free_port
from tests.helpers.world import disagreements

from atoll.host import user_network
from atoll.host.watch import wait_for_exit
from atoll.model.spec import NicSpec, PortSpec
from atoll.model.state import Phase
from atoll.qemu import devices

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

ADDRESS = (
    "i=0; until ip address show eth0 | grep -q 'inet '; do i=$((i+1)); [ $i -lt 300 ] || exit 1; usleep 100000; done"
)
LOOPBACK_BY_WIRE = """
for each in all eth0; do echo 1 > /proc/sys/net/ipv4/conf/$each/route_localnet; done
ip address flush dev lo; ip route flush table local dev lo; ip route add 127.0.0.0/8 via 10.0.2.2
ip route get 127.0.0.1 | grep -q 'dev eth0'
"""
"""Sends what is for the guest's own loopback to the gateway."""


def helper(vm: Machine) -> int:
    pid = user_network.helper_of(_control(vm))
    assert pid is not None
    return pid


def _control(vm: Machine) -> Path:
    return vm._services.layout.vm(vm.id).network_control("net0")


@contextlib.asynccontextmanager
async def greeter(address: str) -> AsyncIterator[int]:
    """A server of the host's that says hello; yields its port."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello from the host\n")
        writer.close()

    server = await asyncio.start_server(greet, address, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def heard(vm: Machine, address: str, port: int) -> str:
    result = await vm.exec(["sh", "-c", f"nc -w 4 {address} {port} < /dev/null"])
    return result.text


async def echo(vm: Machine, port: PortSpec) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a server in the guest that gives back what it gets."""
    await vm.sh(f"nc -ll -p {port.guest_port} -e cat > /dev/null 2>&1 &")
    await vm.sh(f"until netstat -tln | grep -q ':{port.guest_port} '; do usleep 50000; done")
    return await asyncio.open_connection(port.host_address, port.host_port)


async def comes_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> bool:
    writer.write(text + b"\n")
    return await asyncio.wait_for(reader.readline(), 20) == text + b"\n"


def own_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("203.0.113.1", 9))
        return str(probe.getsockname()[0])
    return None


async def test_a_guest_gets_an_address_and_reaches_the_network_but_not_the_hosts_loopback(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh(ADDRESS)
    assert "10.0.2.15/24" in await vm.sh("ip address show eth0")
    if (address := own_address()) is not None:
        async with greeter(address) as port:
            assert await heard(vm, address, port) == "hello from the host"
    with contextlib.suppress(OSError):
        name = "deb.debian.org"
        found = {entry[4][0] for entry in socket.getaddrinfo(name, 80, family=socket.AF_INET)}
        answer = await vm.sh(f"nslookup {name}")
        assert any(str(each) in answer for each in found)
    async with greeter("127.0.0.1") as port:
        assert await heard(vm, "10.0.2.2", port) == ""
        await vm.sh(LOOPBACK_BY_WIRE)
        assert await heard(vm, "127.0.0.1", port) == ""


async def test_the_way_by_wire_is_one_without_the_filter(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would prove nothing."""
    monkeypatch.setattr(user_network.frame_filter, "guard", lambda *_, **__: None)
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh(ADDRESS)
    async with greeter("127.0.0.1") as port:
        await vm.sh(LOOPBACK_BY_WIRE)
        assert await heard(vm, "127.0.0.1", port) == "hello from the host"


async def test_a_restricted_guest_has_no_way_out_and_can_be_reached(factory: Factory) -> None:
    port = PortSpec(host_port=free_port(), guest_port=80)
    vm = await factory.run("tiny", name="v", memory="96MiB", restrict_network=True, ports=(port,))
    await vm.sh(ADDRESS)
    assert await comes_back(*await echo(vm, port), b"from outside")
    if (address := own_address()) is not None:
        async with greeter(address) as listening:
            assert await heard(vm, address, listening) == ""
    assert (await vm.exec(["nslookup", "deb.debian.org"])).exit_code != 0


async def test_a_connection_goes_on_while_ports_come_and_go_also_in_a_paused_guest(factory: Factory) -> None:
    first, second = (PortSpec(host_port=free_port(), guest_port=number) for number in (80, 81))
    vm = await factory.run("tiny", name="v", memory="96MiB", ports=(first,))
    await vm.sh(ADDRESS)
    ends = await echo(vm, first)
    assert await comes_back(*ends, b"one")
    await vm.publish(second)
    assert await comes_back(*await echo(vm, second), b"of the second")
    await vm.unpublish(first.host_port)
    assert await comes_back(*ends, b"two")
    await vm.pause()
    await vm.publish(first)
    await vm.unpublish(second.host_port)
    await vm.resume()
    assert await comes_back(*ends, b"three")
    assert await comes_back(*await asyncio.open_connection("127.0.0.1", first.host_port), b"four")
    assert await disagreements(factory.layout) == []


@pytest.mark.slow
async def test_ports_of_a_stopped_vm_are_there_after_its_start_and_each_restart(factory: Factory) -> None:
    port = PortSpec(host_port=free_port(), guest_port=80)
    vm = await factory.create("tiny", name="v", memory="96MiB")
    await vm.publish(port)
    await vm.start(wait=True, timeout=120)
    for _ in range(2):
        await vm.sh(ADDRESS)
        assert await comes_back(*await echo(vm, port), b"hello")
        before = helper(vm)
        await vm.restart(force=True)
        await asyncio.wait_for(wait_for_exit(before), 5)
        await vm.wait("ready", timeout=120)
    assert await disagreements(factory.layout) == []


async def test_a_helper_ends_with_its_qemu_however_that_ends(factory: Factory) -> None:
    port = PortSpec(host_port=free_port(), guest_port=80)
    vm = await factory.run("tiny", name="v", memory="96MiB", ports=(port,))
    pid = helper(vm)
    os.kill(vm.pid, signal.SIGKILL)
    await asyncio.wait_for(wait_for_exit(pid), 5)
    await vm.start(wait=True, timeout=120)
    pid = helper(vm)
    await vm.sh("poweroff -f -d 1 > /dev/null 2>&1 &")
    await asyncio.wait_for(wait_for_exit(pid), 60)
    # The port is free at once.
    await vm.start()
    pid = helper(vm)
    await vm.rm(force=True)
    await asyncio.wait_for(wait_for_exit(pid), 5)


KILLED_AT = {
    "before it is connected": "user_network._connected",
    "before it is guarded": "user_network.frame_filter.guard",
    "before QEMU has it": "launch._fill",
}


@pytest.mark.parametrize("moment", KILLED_AT)
async def test_a_tool_that_is_killed_leaves_no_helper(factory: Factory, moment: str) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    action = f"""
from atoll.host import launch, user_network
import os, signal
{KILLED_AT[moment]} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
await (await host.get('v')).start()
"""
    assert tool.run(factory.layout, action)[0] == -signal.SIGKILL
    # The next command tidies up.
    await vm.start()
    helpers = [argv for argv in leftovers.processes_of(factory.folder).values() if "slirp4netns" in argv]
    assert len(helpers) == 1
    await vm.rm(force=True)


async def test_a_helper_that_dies_takes_the_network_only(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh(ADDRESS)
    os.kill(helper(vm), signal.SIGKILL)
    assert await vm.sh("echo still here") == "still here"
    await vm.exec(["ping", "-c", "1", "-W", "1", "10.0.2.2"])
    assert await vm.phase() is Phase.RUNNING
    await vm.restart(force=True)
    await vm.wait("ready", timeout=120)
    await vm.sh(ADDRESS)


@pytest.mark.slow
async def test_restores_and_forks_have_helpers_of_their_own(factory: Factory) -> None:
    port = PortSpec(host_port=free_port(), guest_port=80)
    vm = await factory.run("tiny", name="v", memory="96MiB", ports=(port,))
    await vm.sh(ADDRESS)
    await echo(vm, port)
    await vm.snapshot("s")
    before = helper(vm)
    await vm.restore("s")
    assert helper(vm) != before
    await asyncio.wait_for(wait_for_exit(before), 5)
    assert await comes_back(*await asyncio.open_connection("127.0.0.1", port.host_port), b"after it")
    copies = [factory.machine(copy) for copy in await vm.fork(3)]  # type: ignore[arg-type]
    pids = {helper(each) for each in (vm, *copies)}
    assert len(pids) == 4
    ports = [PortSpec(host_port=free_port(), guest_port=80) for _ in copies]
    for copy, its in zip(copies, ports, strict=True):
        await copy.publish(its)
        assert await comes_back(*await asyncio.open_connection("127.0.0.1", its.host_port), b"to a copy")
    await vm.suspend()
    await vm.resume()
    assert await comes_back(*await asyncio.open_connection("127.0.0.1", port.host_port), b"awake")
    for each in (*copies, vm):
        await each.rm(force=True)
    for pid in pids:
        await asyncio.wait_for(wait_for_exit(pid), 5)


@pytest.mark.slow
async def test_memory_that_was_saved_with_a_network_of_qemu_s_own_is_loaded(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is in the stream, and QEMU refuses what it has no place for."""

    def own(nic: NicSpec) -> devices.Properties:
        return {"type": "user", "id": f"net-{nic.name}"}

    with monkeypatch.context() as patch:
        patch.setattr(devices, "network_backend", own)
        vm = await factory.run("tiny", name="v", memory="96MiB")
        await vm.sh(ADDRESS)
        await vm.snapshot("s")
        await vm.suspend()
    await vm.resume()
    await vm.sh("nslookup localhost 10.0.2.3 || ping -c 1 -W 5 10.0.2.2")
    await vm.restore("s")
    (copy,) = await vm.fork(1)
    await factory.machine(copy).sh("ping -c 1 -W 5 10.0.2.2")  # type: ignore[arg-type]
    await vm.snapshot("new")
    await vm.restore("new")
    await vm.sh("ping -c 1 -W 5 10.0.2.2")
