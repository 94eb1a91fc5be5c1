"""IPv6 on networks that VMs share, with real guests."""

import pytest
from tests.helpers import frames
from tests.helpers.guest_net import put_guest_net, send_frames
from tests.helpers.machines import Factory, Machine
from tests.vm.test_networks import address_of, hosts

from atoll.model import subnets
from atoll.model.requests import NetworkRequest, NicRequest, NicSetRequest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

__all__ = ["hosts"]
ON_LAB = {"memory": "96MiB", "nics": (NicRequest(network="lab"),)}


async def address6_of(vm: Machine, hosts: Factory) -> str:
    """Its own, once it has made it."""
    cards = (await hosts.host.networks.show("lab")).attached
    wanted = next(card.address6 for card in cards if card.vm == vm.name)
    await vm.sh(f"for i in $(seq 100); do ip -6 addr | grep {wanted}/ | grep -qv tent && exit; sleep 0.1; done; exit 1")
    return wanted


async def pings(vm: Machine, address: str, size: int = 56) -> bool:
    said = await vm.exec(["sh", "-c", f"for i in 1 2 3; do ping6 -c 1 -W 2 -s {size} {address} && exit; done; exit 1"])
    return said.exit_code == 0


async def test_guests_reach_each_other_and_are_nobody_else(hosts: Factory) -> None:
    network = await hosts.host.networks.create(NetworkRequest(name="lab", ipv6=True))
    assert network.subnet6 is not None
    bad = await hosts.run("tiny", name="bad", **ON_LAB)
    peer = await hosts.run("tiny", name="peer", **ON_LAB)
    await address_of(bad)
    of_bad, of_peer = await address6_of(bad, hosts), await address6_of(peer, hosts)
    assert (
        await pings(bad, of_peer)
        and await pings(peer, of_bad)
        and await pings(bad, subnets.gateway6_of(network.subnet6))
    )
    assert await pings(bad, of_peer, size=4000)
    assert await pings(bad, "peer.lab.atoll")
    assert of_peer in await bad.sh("nslookup -type=aaaa peer.lab.atoll")
    assert "default" not in await bad.sh("ip -6 route"), "no way leads out"

    # An address that isn't its own: neither as a source, nor told to neighbours, nor in their way.
    stolen = subnets.address6(network.subnet6, "52:54:00:66:66:66")
    await bad.sh(f"echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip -6 addr add {stolen}/128 dev eth0")
    assert (await bad.exec(["ping6", "-c", "2", "-W", "1", "-I", stolen, of_peer])).exit_code != 0
    assert not await pings(peer, stolen)
    assert "REACHABLE" not in await peer.sh(f"ip -6 neigh show {stolen}")
    await bad.sh(f"ip -6 addr del {stolen}/128 dev eth0; ip -6 addr add {of_peer}/128 dev eth0")
    await peer.sh("ip link set eth0 down; ip link set eth0 up")
    await address6_of(peer, hosts)
    assert "dadfailed" not in await peer.sh("ip -6 addr"), "nobody says that it has the address already"
    await bad.sh(f"ip -6 addr del {of_peer}/128 dev eth0")
    assert await pings(bad, of_peer)

    # It is no router, and hands out nothing.
    await put_guest_net(bad)
    mac, link = bad.record.spec.nics[0].mac, subnets.address6(subnets.LINK_LOCAL6, bad.record.spec.nics[0].mac)
    advert = frames.router_advert(mac, link, prefix="fd66::")
    await send_frames(bad, [advert], count=3)
    said = await peer.sh("sleep 1; ip -6 addr; ip -6 route")
    assert "fd66:" not in said and "default" not in said


@pytest.mark.slow
async def test_copies_and_groups(hosts: Factory) -> None:
    await hosts.host.networks.create(NetworkRequest(name="lab", ipv6=True))
    peer = await hosts.run("tiny", name="peer", **ON_LAB)
    web = await hosts.run("tiny", name="web", **ON_LAB)
    of_peer, of_web = await address6_of(peer, hosts), await address6_of(web, hosts)
    fork = hosts.machine((await web.fork(1, name="copy"))[0])
    of_fork = await address6_of(fork, hosts)
    assert of_fork != of_web
    assert await pings(peer, of_fork) and await pings(fork, of_web)

    await hosts.host.networks.groups.create(
        "shut", [f"allow in udp 9000 from {of_peer}", f"deny out icmp to {of_fork}"]
    )
    await web.net_set(NicSetRequest(groups=("shut",)))
    for vm in (peer, web, fork):
        await put_guest_net(vm)
        await vm.sh("guest_net echo 9000 >/dev/null 2>&1 &")

    async def echoes(vm: Machine, address: str) -> bool:
        return (await vm.exec(["guest_net", "ask", address, "9000"])).text == "hello"

    assert not await pings(peer, of_web) and await pings(web, of_peer) and await pings(web, of_peer, size=4000)
    assert await echoes(peer, of_web) and not await echoes(fork, of_web)
    assert await echoes(web, of_fork) and not await pings(web, of_fork)
