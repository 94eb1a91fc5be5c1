"""Security groups and limits on networks that VMs share, with real guests."""

import asyncio
import re
import socket
import time
from collections.abc import Awaitable

import pytest
from tests.helpers.guest_net import put_guest_net
from tests.helpers.machines import Factory, Machine
from tests.helpers.ports import free_port
from tests.vm.test_networks import address_of, hosts, outer_address, processes_of

from atoll.errors import InvalidInput, NotFound, WrongState
from atoll.model.requests import NetworkRequest, NicRequest, NicSetRequest, SetRequest
from atoll.model.spec import PortSpec

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

__all__ = ["hosts"]
SMALL = "96MiB"
PORTS = (80, 8050, 5432)


def on(network: str, *groups: str, limit: int = 0) -> dict[str, object]:
    return {"memory": SMALL, "nics": (NicRequest(network=network, groups=groups, limit=limit),)}


async def serve(vm: Machine) -> None:
    """A web server on each port, and one that sends UDP packets back to where they come from."""
    await vm.sh("mkdir -p /www; echo served > /www/index.html")
    for port in PORTS:
        await vm.sh(f"httpd -p {port} -h /www")
    await put_guest_net(vm)
    await vm.sh("guest_net echo 9000 >/dev/null 2>&1 &")


async def fetches(vm: Machine, address: str, port: int = 80) -> bool:
    asked = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 5 nc -w 2 {address} {port}"
    return "served" in (await vm.exec(["sh", "-c", asked])).text


async def pings(vm: Machine, address: str, size: int = 56) -> bool:
    said = await vm.exec(["sh", "-c", f"for i in 1 2; do ping -c 1 -W 2 -s {size} {address} && exit; done; exit 1"])
    return said.exit_code == 0


async def echoes(vm: Machine, address: str) -> bool:
    """By UDP."""
    return (await vm.exec(["guest_net", "ask", address, "9000"])).text == "hello"


async def none(*attempts: Awaitable[bool]) -> bool:
    """Whether all of them fail, which takes some seconds each: so at the same time."""
    return not any(await asyncio.gather(*attempts))


async def test_what_may_reach_a_guest_and_what_it_may_reach(hosts: Factory) -> None:
    groups = hosts.host.networks.groups
    await hosts.host.networks.create("lab")
    await groups.create("web", ["deny in tcp 80 from label:banned", "allow in tcp 80,8000-8100 from any"])
    await groups.create("db", ["allow in tcp 5432 from label:role=web", "allow in icmp from group:web"])
    peer = await hosts.run("tiny", name="peer", **on("lab"))
    web = await hosts.run("tiny", name="web", **on("lab", "web"))
    db = await hosts.run("tiny", name="db", **on("lab", "db"))
    for vm in (peer, web, db):
        await serve(vm)
    to_peer, to_web, to_db = [await address_of(vm) for vm in (peer, web, db)]

    # By port, and by protocol.
    assert await fetches(peer, to_web) and await fetches(peer, to_web, 8050)
    assert await none(fetches(peer, to_web, 5432), pings(peer, to_web), echoes(peer, to_web))
    # Its own connections and their answers pass: TCP, UDP (names, too) and ICMP, also in pieces.
    await web.sh("nslookup peer.lab.atoll")
    assert await fetches(web, to_peer, 5432) and await echoes(web, to_peer) and await pings(web, to_peer)
    assert await pings(web, to_peer, size=4000) and not await pings(peer, to_web, size=4000)

    # By a group, and by a label, which comes and goes.
    assert await pings(web, to_db) and await none(pings(peer, to_db), fetches(web, to_db, 5432))
    await web.set(SetRequest(labels={"role": "web"}))
    assert await fetches(web, to_db, 5432) and not await fetches(peer, to_db, 5432)
    await web.set(SetRequest(labels={"role": "db"}))
    assert not await fetches(web, to_db, 5432)
    await peer.set(SetRequest(labels={"banned": ""}))
    assert not await fetches(peer, to_web) and await fetches(peer, to_web, 8050), "the first rule that fits holds"

    # By a subnet, out as well; changed while they run.
    await groups.set("db", [f"deny out tcp 80 to {to_peer}", f"allow in udp from {to_peer}/32"])
    assert not await fetches(db, to_peer) and await fetches(db, to_peer, 8050) and await fetches(db, to_web)
    assert await echoes(peer, to_db) and await none(echoes(web, to_db), pings(web, to_db))
    await groups.set("db", ["allow in tcp 80 from any", "deny out any to any"])
    assert await fetches(peer, to_db) and await none(pings(db, to_peer), fetches(db, to_web))

    await db.net_set(NicSetRequest(groups=()))
    assert await pings(peer, to_db) and await pings(db, to_peer)
    changes = await db.net_set(NicSetRequest(network="lab", groups=("web", "db")))
    assert [(change.name, change.value, change.when) for change in changes] == [("net0 groups", "web db", "now")]
    assert await fetches(web, to_db, 8050) and await none(pings(peer, to_db), pings(db, to_peer))

    # What can't be, and changes nothing.
    with pytest.raises(WrongState, match="db has it"):
        await groups.rm("db")
    with pytest.raises(NotFound, match="no security group 'none'"):
        await db.net_set(NicSetRequest(groups=("none",)))
    with pytest.raises(NotFound, match="no security group 'none'"):
        await groups.set("db", ["allow in any from group:none"])
    with pytest.raises(InvalidInput, match="is no rule"):
        await groups.set("db", ["allow everything"])
    assert (await groups.show("db")).rules == ("allow in tcp 80 from any", "deny out any to any")


@pytest.mark.slow
async def test_copies_and_restored_machines_keep_their_groups(hosts: Factory) -> None:
    groups = hosts.host.networks.groups
    await hosts.host.networks.create("lab")
    await groups.create("web", ["allow in tcp 80 from any"])
    await groups.create("shut")
    peer = await hosts.run("tiny", name="peer", **on("lab"))
    web = await hosts.run("tiny", name="web", **on("lab", "web"))
    await serve(web)
    await address_of(peer)
    await web.snapshot("then")
    fork = hosts.machine((await web.fork(1, name="copy"))[0])
    to_fork = await address_of(fork)
    assert await fetches(peer, to_fork) and await none(fetches(peer, to_fork, 8050), pings(peer, to_fork))

    # The past opens no door that was shut since.
    await web.net_set(NicSetRequest(groups=("shut",)))
    await web.restore("then")
    assert web.record.spec.nics[0].groups == ("shut",)
    assert not await fetches(peer, await address_of(web))
    await web.net_set(NicSetRequest(groups=("web",)))
    assert await fetches(peer, await address_of(web))


async def test_published_ports_lead_in_and_nothing_else_does(hosts: Factory) -> None:
    network = await hosts.host.networks.create(NetworkRequest(name="wan", mode="nat"))
    await hosts.host.networks.groups.create("shut")
    published, late = free_port(), free_port()
    web = await hosts.run(
        "tiny", name="web", ports=(PortSpec(host_port=published, guest_port=80),), **on("wan", "shut")
    )
    peer = await hosts.run("tiny", name="peer", **on("wan"))
    await serve(web)
    address = await address_of(web)

    def reached(port: int, host: str = "127.0.0.1") -> bool:
        try:
            with socket.create_connection((host, port), timeout=3) as client:
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return b"served" in b"".join(iter(lambda: client.recv(4096), b""))
        except OSError:
            return False

    assert reached(published)
    assert not await fetches(peer, address), "its neighbours don't come in through it"
    await web.publish(PortSpec(host_port=late, guest_port=8050, host_address="0.0.0.0"))
    assert reached(late, outer_address())
    await web.unpublish(late)
    assert not reached(late, outer_address())

    # From outside only published ports lead in, with groups and without: nothing else of the network is anywhere.
    await web.net_set(NicSetRequest(groups=()))
    assert reached(published) and await fetches(peer, address)
    assert not reached(80, address) and not reached(8050, address)
    assert f"{address}:" not in processes_of(network)


@pytest.mark.slow
async def test_a_card_has_a_limit(hosts: Factory) -> None:
    await hosts.host.networks.create("lab")
    slow = await hosts.run("tiny", name="slow", **on("lab", limit=500_000))
    peer = await hosts.run("tiny", name="peer", **on("lab"))
    await slow.sh("mkdir -p /www; dd if=/dev/zero of=/www/file bs=1M count=2 2>/dev/null; httpd -h /www")
    address = await address_of(slow)
    await address_of(peer)

    async def seconds() -> float:
        begun = time.monotonic()
        assert re.match("2097152 ", await peer.sh(f"wget -q -O - http://{address}/file | wc -c") + " ")
        return time.monotonic() - begun

    limited = await seconds()
    assert limited > 2, "2 MiB at 0.5 MB a second, of which a little passes at once"
    await slow.net_set(NicSetRequest(limit=0))
    assert await seconds() < limited / 2
