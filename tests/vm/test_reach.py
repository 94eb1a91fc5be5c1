"""Ports of guests and displays as byte streams: in this process, through an agent, and from the command line."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.helpers.agents import agent
from tests.helpers.command import ATOLL
from tests.helpers.images import adopt_cached
from tests.helpers.ports import free_port
from websockets.asyncio.client import unix_connect

from atoll.errors import InvalidInput, NetworkFailed, Unsupported, WrongState
from atoll.host import slirp
from atoll.layout import Layout
from atoll.model.requests import NicRequest
from atoll.model.spec import PortSpec
from atoll.platform.api import AsyncHost, AsyncVm, Connection
from atoll.platform.local import LocalHost
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place

pytestmark = [pytest.mark.vm, pytest.mark.timeout(90)]
ECHO = "busybox nc -ll -p 7 -e cat >/dev/null 2>&1 </dev/null & sleep 0.3"


@pytest.fixture(params=["process", "socket"])
async def host(request: pytest.FixtureRequest, layout: Layout) -> AsyncIterator[AsyncHost]:
    await adopt_cached("tiny", layout)
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "process":
            reached: AsyncHost = LocalHost(layout)
        else:
            await stack.enter_async_context(agent(layout))
            reached = RemoteHost(Place(url="http://atoll", socket=str(layout.agent_socket)))
        async with reached:
            try:
                yield reached
            finally:
                for each in await reached.ls():
                    await (await reached.get(each.vm.id)).rm(force=True)
                for network in await reached.networks.ls():
                    await reached.networks.rm(network.network.id)


async def all_of(connection: Connection) -> bytes:
    """What comes until the other side ends."""
    found = b""
    async with asyncio.timeout(30):
        while data := await connection.read():
            found += data
    return found


async def echoed(vm: AsyncVm, content: bytes) -> bytes:
    """What the guest's echo makes of it, until both sides have ended."""
    connection = await vm.connect(7)

    async def send() -> None:
        await connection.write(content)
        await connection.end()

    sending = asyncio.create_task(send())
    try:
        return await all_of(connection)
    finally:
        await sending
        await connection.close()


async def test_a_guest_s_port_is_reached_though_it_isn_t_published(host: AsyncHost, layout: Layout) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB")
    await vm.exec(["sh", "-c", ECHO])
    content = bytes(range(256)) * 4096
    assert await echoed(vm, content) == content
    assert await asyncio.gather(*(echoed(vm, bytes([each]) * 1000) for each in range(5))) == [
        bytes([each]) * 1000 for each in range(5)
    ]
    assert slirp.published(layout.vm(vm.id).network_control("net0")) == []
    await vm.publish(PortSpec(host_port=free_port(), guest_port=7))
    assert await echoed(vm, b"published") == b"published"

    with pytest.raises(InvalidInput):
        await vm.connect(0)
    await vm.stop(force=True)
    with pytest.raises(WrongState, match="stopped"):
        await vm.connect(7)


async def test_a_guest_s_port_is_reached_on_a_shared_network(host: AsyncHost) -> None:
    await host.networks.create("lab")
    vm = await host.run("tiny", name="web", memory="128MiB", nics=(NicRequest(network="lab"),))
    await vm.exec(["sh", "-c", ECHO])
    assert await echoed(vm, b"over the bridge") == b"over the bridge"
    with pytest.raises(NetworkFailed, match="nobody answers at port 81"):
        await vm.connect(81)


async def test_a_display_is_seen(host: AsyncHost) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB", display="vga")
    two = [await vm.vnc(), await vm.vnc()]
    for connection in two:
        assert await asyncio.wait_for(connection.read(), 10) == b"RFB 003.008\n"
        await connection.write(b"RFB 003.008\n")
        assert await asyncio.wait_for(connection.read(), 10) == b"\x01\x01"
    for connection in two:
        await connection.close()
    blind = await host.create("tiny", name="blind", memory="128MiB")
    with pytest.raises(Unsupported, match="no display"):
        await blind.vnc()


async def test_viewers_in_browsers_get_bytes_only(layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    async with LocalHost(layout) as host, agent(layout):
        vm = await host.run("tiny", name="web", memory="128MiB", display="vga")
        async with unix_connect(
            str(layout.agent_socket), "ws://atoll/v1/vms/web/vnc", subprotocols=["binary"]
        ) as viewer:
            assert viewer.subprotocol == "binary"
            assert await viewer.recv() == b"RFB 003.008\n"
        await vm.rm(force=True)


async def test_the_command_line_forwards_until_it_is_ended(layout: Layout, home: Path) -> None:
    await adopt_cached("tiny", layout)
    async with LocalHost(layout) as host:
        vm = await host.run("tiny", name="web", memory="128MiB", display="vga")
        await vm.exec(["sh", "-c", ECHO])
        port = free_port()
        for words, said, answer in (
            (("port", "forward", "web", f"{port}:7"), b"hello", b"hello"),
            (("vnc", "web", str(port)), b"", b"RFB 003.008\n"),
        ):
            command = await asyncio.create_subprocess_exec(*ATOLL, *words, stderr=asyncio.subprocess.PIPE)
            assert command.stderr is not None
            assert str(port).encode() in await asyncio.wait_for(command.stderr.readline(), 30)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            if said:
                writer.write_eof()
                assert await asyncio.wait_for(reader.read(), 30) == answer
            else:
                assert await asyncio.wait_for(reader.readexactly(12), 30) == answer
            writer.close()
            command.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(command.wait(), 30) == 130
        await vm.rm(force=True)
