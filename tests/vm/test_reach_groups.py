"""Connections to guests' ports from their computer, past security groups: they open no door for anybody else."""

import asyncio
import re
import signal

import pytest
from tests.helpers.agents import remote_agent, trusting
from tests.helpers.command import ATOLL
from tests.helpers.machines import Factory
from tests.helpers.ports import free_port
from tests.vm.test_network_groups import fetches, none, on, serve
from tests.vm.test_networks import address_of, hosts

from atoll.errors import Forbidden, NetworkFailed
from atoll.model.requests import NicSetRequest
from atoll.platform.api import AsyncVm
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place
from atoll.store.tokens import Tokens

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(400)]
__all__ = ["hosts"]
ASK = b"GET / HTTP/1.0\r\n\r\n"


async def served(vm: AsyncVm, port: int = 80) -> bool:
    connection = await vm.connect(port)
    await connection.write(ASK)
    found = b""
    try:
        async with asyncio.timeout(30):
            while data := await connection.read():
                found += data
    finally:
        await connection.close()
    return b"served" in found


async def test_a_forward_obeys_groups_and_lets_nobody_else_in(hosts: Factory) -> None:
    groups = hosts.host.networks.groups
    lab = await hosts.host.networks.create("lab")
    await hosts.host.networks.create("far")
    await groups.create("shut")
    web = await hosts.run("tiny", name="web", **on("lab", "shut", limit=1_000_000))
    peer = await hosts.run("tiny", name="peer", **on("lab"))
    stranger = await hosts.run("tiny", name="stranger", **on("far"))
    await serve(web)
    to_web = await address_of(web)
    await address_of(peer)
    own = re.sub(r"\d+$", "1", to_web)
    assert to_web.startswith(str(lab.subnet).rpartition(".")[0])

    # What no rule lets in comes in neither from this computer, which says why.
    with pytest.raises(NetworkFailed, match="security groups shut, which hold for this computer as well"):
        await web.connect(80)

    await groups.set("shut", [f"allow in tcp 80 from {own}"])
    async with remote_agent(hosts.layout) as url:
        tokens, tls = Tokens(hosts.layout.tokens), trusting(hosts.layout)
        _, operate = tokens.create("operate", scope="operate")
        _, read = tokens.create("read", scope="read")
        async with RemoteHost(Place(url=url, token=read, tls=tls)) as host:
            with pytest.raises(Forbidden):
                await (await host.get("web")).connect(80)
        async with RemoteHost(Place(url=url, token=operate, tls=tls)) as host:
            reached = await host.get("web")
            assert await served(reached)
            opened = await reached.connect(80)
            assert await none(fetches(peer, to_web), fetches(stranger, to_web)), "it is no door for others"
            with pytest.raises(NetworkFailed):
                await reached.connect(8050)
            await opened.close()

    # A forward ends with the command that made it, whatever becomes of that.
    port = free_port()
    command = await asyncio.create_subprocess_exec(
        *ATOLL, "port", "forward", "web", f"{port}:80", stderr=asyncio.subprocess.PIPE
    )
    assert command.stderr is not None
    assert str(port).encode() in await asyncio.wait_for(command.stderr.readline(), 30)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    established = f"{to_web}:80.*ESTABLISHED"
    await seen(web, established, there=True)
    assert await none(fetches(peer, to_web), fetches(stranger, to_web))
    command.send_signal(signal.SIGKILL)
    await command.wait()
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    await seen(web, established, there=False)

    # Without groups it is reached, and by its neighbours again.
    await web.net_set(NicSetRequest(groups=()))
    assert await served(web, 8050) and await fetches(peer, to_web, 8050)


async def seen(vm: AsyncVm, connection: str, *, there: bool) -> None:
    """Until the guest has such a connection, or has it no more."""
    async with asyncio.timeout(60):
        while bool(re.search(connection, (await vm.exec(["netstat", "-tn"])).text)) is not there:
            await asyncio.sleep(0.2)
