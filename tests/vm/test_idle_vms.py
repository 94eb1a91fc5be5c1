"""VMs that nobody uses are suspended by the agent, and go on when a command or a caller wants them."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace
from tests.helpers.agents import agent
from tests.helpers.command import atoll
from tests.helpers.images import adopt_cached
from tests.helpers.ports import free_port

from atoll.errors import InvalidInput, WrongState
from atoll.host import namespace, slirp
from atoll.layout import Layout
from atoll.model.requests import NetworkRequest, NicRequest, SetRequest
from atoll.model.spec import PortSpec
from atoll.model.state import Phase
from atoll.model.vm import Event
from atoll.platform.local import LocalHost, LocalVm
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

SOON = 2
"""Seconds without use after which these are suspended."""
WEB = """
mkdir -p /www/cgi-bin; echo alive > /www/index.html
printf '#!/bin/sh\\necho; echo "$REMOTE_ADDR"\\n' > /www/cgi-bin/who; chmod +x /www/cgi-bin/who
busybox httpd -h /www -p 80
"""
LISTEN = """
nc -l -p 80 -e sleep 1000 >/dev/null 2>&1 &
until netstat -tln | grep -q ':80 '; do sleep 0.1; done
"""


@pytest.fixture
async def host(layout: Layout) -> AsyncIterator[LocalHost]:
    """This computer, past the agent: what is asked of it here doesn't go through that."""
    await adopt_cached("tiny", layout)
    async with LocalHost(layout) as opened:
        try:
            yield opened
        finally:
            for each in await opened.ls():
                await (await opened.get(each.vm.id)).rm(force=True)
            for network in await opened.networks.ls():
                await opened.networks.rm(network.network.name)


class Seen:
    """What happens from now on, each event once."""

    def __init__(self, host: LocalHost) -> None:
        self._host = host
        self._last = host.last_event()

    async def next(self, kind: str, *, seconds: float = 120) -> Event:
        """The next of its kind."""
        events = self._host.events(after=self._last)
        async with asyncio.timeout(seconds), contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                self._last = event.id
                if event.kind == kind:
                    return event
        raise AssertionError(f"there was no {kind}")

    async def asleep(self) -> None:
        assert (await self.next("vm.suspended")).data == {"reason": "idle"}


async def fetch(port: int, path: str = "/", *, address: str = "127.0.0.1") -> str:
    """The body of the guest's answer."""
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(address, port)
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
    return answer.decode().partition("\r\n\r\n")[2].strip()


async def web_server(host: LocalHost, port: int, **options: object) -> LocalVm:
    published = () if "nics" in options else (PortSpec(host_port=port, guest_port=80),)
    vm = await host.run("tiny", name="web", memory="96MiB", ports=published, **options)
    assert (await vm.exec(["sh", "-c", WEB])).exit_code == 0
    return vm


async def test_callers_and_commands_wake_what_nobody_used(host: LocalHost, layout: Layout) -> None:
    port, seen = free_port(), Seen(host)
    async with agent(layout):
        vm = await web_server(host, port)
        await vm.exec(["sh", "-c", "echo kept > /root/state; sleep 1000 >/dev/null 2>&1 & echo $! > /root/pid"])
        awake = await fetch(port, "/cgi-bin/who")
        await vm.set(SetRequest(suspend_when_idle=SOON))
        await seen.asleep()
        info = await vm.info()
        assert (info.phase, info.vm.suspended_because) == (Phase.SUSPENDED, "idle")
        memory = await host.memory()
        assert memory.idle == 1 and memory.idle_memory > 0

        assert await fetch(port, "/cgi-bin/who") == awake, "the guest sees the same caller as if it hadn't slept"
        assert (await seen.next("vm.woken")).data == {"by": "connection"}

        await seen.asleep()
        both = await asyncio.gather(vm.exec(["cat", "/root/state"]), vm.exec(["sh", "-c", "kill -0 $(cat /root/pid)"]))
        assert both[0].text == "kept" and both[1].exit_code == 0
        assert (await seen.next("vm.woken")).data == {"by": "command"}
        kinds = [event.kind async for event in host.events(follow=False, after=0)]
        assert kinds.count("vm.woken") == 2, "two commands at once wake it once"


async def test_it_isnt_for_what_is_thrown_away_nor_inherited(host: LocalHost) -> None:
    with pytest.raises(InvalidInput, match="--rm and --suspend-when-idle"):
        await host.create("tiny", remove_when_stopped=True, suspend_when_idle="30m")
    vm = await host.create("tiny", name="web", suspend_when_idle="30m")
    assert (await vm.info()).vm.suspend_when_idle == 1800
    clone = await vm.clone("copy")
    assert (await clone.info()).vm.suspend_when_idle is None
    changes = await vm.set(SetRequest(suspend_when_idle="never"))
    assert [(each.name, each.value, each.when) for each in changes] == [("suspend-when-idle", "never", "now")]


@pytest.mark.slow
async def test_twenty_callers_at_once_get_their_answers(host: LocalHost, layout: Layout) -> None:
    port, seen = free_port(), Seen(host)
    async with agent(layout):
        vm = await web_server(host, port, suspend_when_idle=SOON)
        for _ in range(3):
            await seen.asleep()
            # One that gives up at once does no harm.
            socket.create_connection(("127.0.0.1", port)).close()
            assert await asyncio.gather(*(fetch(port) for _ in range(20))) == ["alive"] * 20
        assert await vm.info()


@pytest.mark.slow
async def test_who_works_or_is_used_stays_awake(host: LocalHost, layout: Layout) -> None:
    seen = Seen(host)
    port = free_port()
    published = (PortSpec(host_port=port, guest_port=80),)
    names = ("busy", "shell", "paused", "caller", "idle")
    async with agent(layout):
        vms = {
            each: await host.run("tiny", name=each, memory="96MiB", ports=published if each == "caller" else ())
            for each in names
        }
        await vms["busy"].exec(["sh", "-c", "while :; do :; done >/dev/null 2>&1 &"])
        await vms["caller"].exec(["sh", "-c", LISTEN])
        caller = socket.create_connection(("127.0.0.1", port))
        shell = await vms["shell"].shell()
        await vms["paused"].pause()
        for each in vms.values():
            await each.set(SetRequest(suspend_when_idle=SOON))
        assert (await seen.next("vm.suspended")).name == "idle"
        await asyncio.sleep(4 * SOON)
        phases = {each.vm.name: each.phase for each in await host.ls()}
        assert phases == {
            "busy": Phase.RUNNING,
            "shell": Phase.RUNNING,
            "paused": Phase.PAUSED,
            "caller": Phase.RUNNING,
            "idle": Phase.SUSPENDED,
        }
        await shell.close()
        caller.close()
        # Its program doesn't hear that, so it keeps the connection.
        await vms["caller"].exec(["sh", "-c", "kill $(pidof sleep)"])
        assert {(await seen.next("vm.suspended")).name for _ in range(2)} == {"shell", "caller"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_next_agent_listens_again(host: LocalHost, layout: Layout, number: signal.Signals) -> None:
    port, seen = free_port(), Seen(host)
    async with agent(layout) as first:
        vm = await web_server(host, port, suspend_when_idle=SOON)
        await seen.asleep()
        await has_bell(layout, vm)
        await first.end(number)
    with pytest.raises(ConnectionRefusedError):
        await fetch(port)
    async with agent(layout):
        await until_open(port)
        assert await fetch(port) == "alive"
        assert (await seen.next("vm.woken")).data == {"by": "connection"}
        await seen.asleep()
    # Without an agent nobody listens; a command still wakes it.
    assert (await vm.exec(["echo", "here"])).text == "here"
    assert await fetch(port) == "alive"


async def has_bell(layout: Layout, vm: LocalVm) -> None:
    """Until the agent has done all that belongs to its sleep; killed before, it leaves something to recover."""
    async with asyncio.timeout(60):
        while not layout.vm(vm.id).socket("bell").exists():
            await asyncio.sleep(0.05)


async def until_open(port: int) -> None:
    """Until somebody listens there; a connection would wake the VM, so it is looked for in /proc."""
    async with asyncio.timeout(60):
        while not listens(port):  # the kernel tells nobody
            await asyncio.sleep(0.05)


def listens(port: int) -> bool:
    with open("/proc/net/tcp") as table:  # noqa: PTH123
        return any(f":{port:04X} " in line.split("00000000:0000")[0] and " 0A " in line for line in table)


@pytest.mark.slow
async def test_ports_of_a_sleeping_vm_are_its_own_until_they_are_taken_back(host: LocalHost, layout: Layout) -> None:
    port, other, seen = free_port(), free_port(), Seen(host)
    async with agent(layout):
        vm = await web_server(host, port, suspend_when_idle=SOON)
        await seen.asleep()
        await until_open(port)
        with pytest.raises(OSError), socket.socket() as thief:
            thief.bind(("127.0.0.1", port))
        await vm.unpublish(port)
        await vm.publish(PortSpec(host_port=other, guest_port=80))
        await until_open(other)
        assert not listens(port)
        assert await fetch(other) == "alive"
        await seen.asleep()
        await until_open(other)
        await vm.stop()
        assert not listens(other), "its memory is dropped, and nobody is to be waked"
        await vm.start()
        await seen.asleep()
        await until_open(other)
        await vm.rm()
        assert not listens(other)


@pytest.mark.slow
async def test_it_says_so_when_another_program_has_the_port_or_it_cant_wake(host: LocalHost, layout: Layout) -> None:
    port, seen = free_port(), Seen(host)
    async with agent(layout) as first:
        vm = await web_server(host, port, suspend_when_idle=SOON)
        await seen.asleep()
        await has_bell(layout, vm)
        await first.end(signal.SIGKILL)
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", port))
        thief.listen()
        async with agent(layout):
            told = await seen.next("vm.unreachable")
            assert str(port) in told.data["error"]
            thief.close()
            await until_open(port)
            assert await fetch(port) == "alive"
            await seen.asleep()
    # An agent that may promise nothing: callers are told, and the VM sleeps on.
    async with agent(layout, "--memory-overcommit", "0.0001"):
        await until_open(port)
        with contextlib.suppress(OSError):
            assert await fetch(port) == ""
        failed = await seen.next("vm.wake-failed")
        assert "it can't have 96MiB of memory" in failed.data["error"]
        through_agent = RemoteHost(Place(url="http://atoll", socket=str(layout.agent_socket)))
        async with through_agent:
            with pytest.raises(Exception, match="it can't have 96MiB of memory"):
                await (await through_agent.get("web")).exec(["true"])
        await until_open(port)
    assert (await vm.info()).phase is Phase.SUSPENDED


@pytest.mark.slow
async def test_who_was_suspended_on_demand_isnt_waked(host: LocalHost, layout: Layout) -> None:
    port = free_port()
    async with agent(layout):
        vm = await web_server(host, port, suspend_when_idle="1h")
        await vm.suspend()
        with pytest.raises(WrongState, match="atoll resume web"):
            await vm.exec(["true"])
        with pytest.raises(ConnectionRefusedError):
            await fetch(port)


@pytest.mark.slow
async def test_callers_through_a_shared_network_and_datagrams_wake_too(host: LocalHost, layout: Layout) -> None:
    await host.networks.create(NetworkRequest(name="lab", mode="nat"))
    port, udp, seen = free_port(), free_port(), Seen(host)
    async with agent(layout):
        vm = await web_server(host, port, nics=(NicRequest(network="lab"),))
        await vm.publish(PortSpec(host_port=port, guest_port=80))
        own = await host.run("tiny", name="own", memory="96MiB", ports=(replace(UDP, host_port=udp),))
        awake = await fetch(port, "/cgi-bin/who")
        for each in (vm, own):
            await each.set(SetRequest(suspend_when_idle=SOON))
        for _ in range(2):
            await seen.asleep()
        assert {each.phase for each in await host.ls()} == {Phase.SUSPENDED}
        await asyncio.sleep(1)
        paths = layout.network((await host.networks.show("lab")).network.id)
        uplink = slirp.listener(paths.uplink)
        assert uplink is not None
        namespace.end_all([uplink])
        # What brings the network up again publishes the ports of who sleeps, too.
        assert atoll("net", "exec", "lab", "--", "true").code == 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"first", ("127.0.0.1", udp))
            assert (await seen.next("vm.woken")).name == "own"
        assert await fetch(port, "/cgi-bin/who") == awake
        assert (await seen.next("vm.woken")).name == "web"


UDP = PortSpec(host_port=1, guest_port=7, protocol="udp")


@pytest.mark.slow
async def test_a_killed_agent_touches_nobody_who_is_awake(host: LocalHost, layout: Layout) -> None:
    port, seen = free_port(), Seen(host)
    async with agent(layout) as first:
        vm = await web_server(host, port, suspend_when_idle=SOON)
        await seen.asleep()
        await until_open(port)
        assert await fetch(port) == "alive"
        await vm.set(SetRequest(suspend_when_idle="never"))
        os.kill(first.pid, signal.SIGKILL)
        await first.process.wait()
        assert await fetch(port) == "alive", "its network is QEMU's, whoever began it"
