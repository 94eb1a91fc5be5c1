"""A guest that somebody has taken over, against its neighbours on one network: real guests, real frames.

Each lie is told twice: with the network's guards, and, to see that it is one, without them.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from tests.helpers import frames
from tests.helpers.guest_net import hear_frames, put_guest_net, send_frames
from tests.helpers.machines import Factory, Machine
from tests.vm.test_networks import address_of, answering, hosts, outer_address

from atoll.host import namespace
from atoll.model.network import Attached, Network
from atoll.model.requests import ImpairRequest, NetworkRequest, NicRequest, NicSetRequest
from atoll.model.subnets import LINK_LOCAL6, address6, gateway6_of

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

__all__ = ["hosts"]
ATOLL = "from atoll.cli.main import main; main()"


@dataclass
class Street:
    """A network, and who lives there."""

    hosts: Factory
    network: Network
    bad: Machine
    peer: Machine
    friend: Machine
    cards: dict[str, Attached]

    async def inside(self, *argv: str) -> str:
        """What a program says in the network's namespace."""
        holder = namespace.holder_of(self.hosts.layout.network(self.network.id))
        assert holder is not None
        return (await namespace.run(holder.pid, *argv)).stdout.decode()

    async def guard_again(self) -> None:
        await self.peer.net_impair(ImpairRequest())


@pytest.fixture
async def street(hosts: Factory) -> Street:
    network = await hosts.host.networks.create(NetworkRequest(name="lab", mode="nat", ipv6=True))
    nics = (NicRequest(network="lab"),)
    bad, peer, friend = [
        await hosts.run("tiny", name=name, memory="96MiB", nics=nics) for name in ("bad", "peer", "friend")
    ]
    for vm in (bad, peer, friend):
        await address_of(vm)
        await put_guest_net(vm)
    attached = (await hosts.host.networks.show("lab")).attached
    return Street(hosts, network, bad, peer, friend, {card.vm: card for card in attached})


def lies(street: Street) -> dict[str, bytes]:
    """What `bad` may say to `peer` to be somebody else, or its master."""
    bad, peer, friend = (street.cards[name] for name in ("bad", "peer", "friend"))
    gateway, subnet6 = street.network.gateway, street.network.subnet6
    assert subnet6 is not None
    link, to_link = address6(LINK_LOCAL6, bad.mac), address6(LINK_LOCAL6, peer.mac)
    to, mac, to_mac = (peer.address, 9000), bad.mac, peer.mac

    def arp(claimed: str, claimed_mac: str = mac) -> bytes:
        return frames.arp_reply(mac, to_mac, claimed=claimed, claimed_mac=claimed_mac, to=peer.address)

    return {
        "ARP: the gateway is me": arp(gateway),
        "ARP: the neighbour is me": arp(friend.address),
        "ARP: I am the neighbour": arp(bad.address, friend.mac),
        "MAC of the neighbour": frames.udp4(friend.mac, to_mac, (friend.address, 1), to),
        "MAC of nobody": frames.udp4("52:54:00:66:66:66", to_mac, (bad.address, 1), to),
        "IP of the neighbour": frames.udp4(mac, to_mac, (friend.address, 1), to),
        "IP of the gateway": frames.udp4(mac, to_mac, (gateway, 53), to),
        "IP of elsewhere": frames.udp4(mac, to_mac, ("192.0.2.7", 1), to),
        "DHCP answer": frames.dhcp_ack(mac, to_mac, server=bad.address, address=peer.address),
        "router advertisement": frames.router_advert(mac, link, prefix="fd66::"),
        "neighbour advertisement of the gateway": frames.neighbour_advert(
            mac, to_mac, bad.address6, peer.address6, claimed=gateway6_of(subnet6)
        ),
        "neighbour advertisement of the neighbour": frames.neighbour_advert(
            mac, to_mac, link, to_link, claimed=friend.address6
        ),
        "IPv6 redirect": frames.redirect(mac, to_mac, link, to_link, target=link, destination=friend.address6),
        "IPv6 of the neighbour": frames.udp6(mac, to_mac, (friend.address6, 1), (peer.address6, 9000)),
        "IPv6 link-local of the neighbour": frames.udp6(
            mac, to_mac, (address6(LINK_LOCAL6, friend.mac), 1), (to_link, 9000)
        ),
        "DHCPv6 answer": frames.udp6(mac, to_mac, (link, 547), (to_link, 546)),
        "a VLAN": frames.tagged(frames.udp4(mac, to_mac, (bad.address, 2), to)),
        "another protocol": frames.between(mac, to_mac, 0x88B5, bytes(50)),
    }


async def arrived(street: Street, told: dict[str, bytes]) -> set[str]:
    """Which of these the peer gets, of those that `bad` says three times each."""
    hearing = asyncio.create_task(hear_frames(street.peer, 5))
    await asyncio.sleep(1)
    await send_frames(street.bad, list(told.values()), count=3)
    heard = await hearing
    return {name for name, frame in told.items() if any(each.startswith(frames.untagged(frame)) for each in heard)}


async def reaches(vm: Machine, address: str) -> bool:
    said = await vm.exec(["sh", "-c", f"for i in 1 2 3 4; do ping -c 1 -W 3 {address} && exit; done; exit 1"])
    return said.exit_code == 0


async def test_no_lie_arrives(street: Street) -> None:
    bad, peer, friend = (street.cards[name] for name in ("bad", "peer", "friend"))
    honest = {"honest": frames.udp4(bad.mac, peer.mac, (bad.address, 1), (peer.address, 9000))}
    told = lies(street)
    assert await arrived(street, told | honest) == {"honest"}

    assert await reaches(street.peer, street.network.gateway) and await reaches(street.peer, friend.address)
    neighbours = (await street.peer.read("/proc/net/arp")).splitlines()
    known = {line.split()[0]: line.split()[3] for line in neighbours[1:]}
    assert known[friend.address] == friend.mac and known[street.network.gateway].startswith("02:")
    assert "fd66:" not in await street.peer.sh("ip -6 addr; ip -6 route")
    learned = await street.inside("bridge", "fdb", "show", "br", "br0")
    assert "52:54:00:66:66:66" not in learned

    await street.inside("nft", "delete", "table", "bridge", "atoll")
    try:
        assert await arrived(street, told | honest) == {*told, "honest"}, "they are lies that would be heard"
    finally:
        await street.guard_again()
    assert await arrived(street, told | honest) == {"honest"}


def listed() -> float:
    """Seconds that `atoll ls` takes."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", ATOLL, "ls"], env=dict(os.environ), check=True, capture_output=True)
    return time.monotonic() - begun


async def test_floods_leave_neighbours_and_the_host_reachable(street: Street) -> None:
    bad, peer, friend = (street.cards[name] for name in ("bad", "peer", "friend"))
    everybody, large = "ff:ff:ff:ff:ff:ff", b"x" * 1200
    packet = frames.udp4(bad.mac, peer.mac, (bad.address, 1), (peer.address, 9000), large)
    question = frames.arp_reply(bad.mac, everybody, claimed=bad.address, claimed_mac=bad.mac, to=street.network.gateway)
    floods: dict[str, tuple[bytes, int, int | None]] = {
        # Two bytes of its hardware address; of ARP's body; nothing.
        "of hardware addresses": (packet, 20_000, 10),
        "of ARP": (question, 20_000, 38),
        "of packets": (packet, 20_000, None),
        "of broadcasts": (everybody_hears(packet), 20_000, None),
    }
    for name, (frame, count, vary) in floods.items():
        flood = asyncio.create_task(send_frames(street.bad, [frame], count=count, vary=vary))
        await asyncio.sleep(0.5)
        assert await reaches(street.friend, peer.address), name
        assert await reaches(street.friend, street.network.gateway), name
        assert await asyncio.to_thread(listed) < 20, name
        await flood
        entries = json.loads(await street.inside("bridge", "-j", "fdb", "show", "br", "br0"))
        learned = {entry["mac"] for entry in entries if entry.get("state") != "permanent"}
        assert learned <= {card.mac for card in (bad, peer, friend)}, name
    assert await reaches(street.bad, peer.address), "it is let in again"


def everybody_hears(frame: bytes) -> bytes:
    return b"\xff" * 6 + frame[6:]


async def test_a_flood_of_connections_fills_nobody_elses_notes(street: Street) -> None:
    bad, peer, friend = (street.cards[name] for name in ("bad", "peer", "friend"))
    await street.hosts.host.networks.groups.create("open", ["allow in udp 9000 from any"])
    await street.peer.net_set(NicSetRequest(groups=("open",)))
    await street.friend.sh("guest_net echo 9000 >/dev/null 2>&1 &")
    packet = frames.udp4(bad.mac, peer.mac, (bad.address, 1), (peer.address, 9000))
    await send_frames(street.bad, [packet], count=40_000, vary=34)
    told = json.loads(await street.inside("nft", "-j", "list", "table", "bridge", "groups"))["nftables"]
    notes = [each["set"] for each in told if each.get("set", {}).get("name", "").startswith("others_")]
    assert len(notes[0]["elem"]) > 10_000, "it was flooded"
    # Whom it asks answers still, and it is shut as before.
    assert (await street.peer.exec(["guest_net", "ask", friend.address, "9000"])).text == "hello"
    assert await reaches(street.peer, friend.address) and not await reaches(street.bad, peer.address)


async def test_other_networks_and_the_host_are_out_of_reach(street: Street) -> None:
    other = await street.hosts.host.networks.create("other")
    alone = await street.hosts.run("tiny", name="alone", memory="96MiB", nics=(NicRequest(network="other"),))
    hidden, gateway = await address_of(alone), street.network.gateway
    await alone.sh("mkdir -p /www; echo found >/www/index.html; httpd -h /www")
    await street.bad.sh(f"ip route add {other.subnet} via {gateway}")
    for address in (hidden, other.gateway):
        assert (await street.bad.exec(["ping", "-c", "2", "-W", "1", address])).exit_code != 0, address
    asked = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 5 nc -w 2 {hidden} 80"
    assert "found" not in (await street.bad.exec(["sh", "-c", asked])).text

    # Of the network itself nothing answers but names, addresses and pings; of the host's loopback nothing does.
    for port in (22, 67, 80):
        assert (await street.bad.exec(["timeout", "5", "nc", "-w", "2", gateway, str(port)])).exit_code != 0, port
    with answering("127.0.0.1") as port:
        for address in (gateway, "198.19.255.1", "198.19.255.2", "198.19.255.3", "127.0.0.1"):
            said = await street.bad.exec(["timeout", "5", "nc", "-w", "2", address, str(port)])
            assert "hello" not in said.text, address
    with answering(outer_address()) as port:
        assert "hello" in (await street.bad.exec(["nc", "-w", "5", outer_address(), str(port)])).text, (
            "a way out it has"
        )
