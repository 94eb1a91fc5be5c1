"""Networks of mode bridge: taps of VMs on a bridge that this computer has anyway. Root only.

Nothing but our taps and two nft tables that name them is ours there: guards, and what groups say, which keeps its
notes when it is made anew. They go with the last tap. What is there is asked: the alias of a tap says whose it is and
what its card may say.
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.errors import NetworkFailed, NotFound, ProcessFailed
from atoll.host import namespace, process
from atoll.host.group_text import groups
from atoll.host.link_text import Counted, Port, counted
from atoll.host.network_text import impaired
from atoll.model.network import Members, Network

TAP = "at"
"""What the names of our taps begin with here, for people."""


def mark(network_id: str) -> str:
    return f"atoll-{network_id}"


def group_table(network_id: str) -> str:
    return f"{mark(network_id)}-groups"


def rules(members: Members, taps: Sequence[Port], there: bytes) -> str:
    """For nft: our tables as they shall be. `there` is what `nft -j` tells of that of groups."""
    network_id = members.network.id
    limits = {each.mac: each.limit for each in members.attached}
    return guards(network_id, taps, limits) + groups(members, taps, there, table=group_table(network_id))


def guards(network_id: str, taps: Sequence[Port], limits: Mapping[str, int]) -> str:
    """For nft: a table for our taps; it takes the place of the one before, and isn't there without taps. What isn't
    from them passes untouched. Cards that have a limit, by their hardware addresses, have it here.
    """
    table = f"table bridge {mark(network_id)}"
    gone = f"{table}\ndelete {table}\n"
    if not taps:
        return gone
    fixed = [tap for tap in taps if tap.address]
    names = ", ".join(f'"{tap.tap}"' for tap in taps)
    macs = ", ".join(f'"{tap.tap}" . {tap.mac}' for tap in taps)
    with_address = ", ".join(f'"{tap.tap}"' for tap in fixed)
    addresses = ", ".join(f'"{tap.tap}" . {tap.address}' for tap in fixed)
    of_fixed = f"""
        iifname {{ {with_address} }} ether type arp iifname . arp saddr ip != @addresses drop
        iifname {{ {with_address} }} ether type ip ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
        iifname {{ {with_address} }} ether type ip iifname . ip saddr != @addresses drop"""
    return f"""{gone}{table} {{
    set macs {{
        type ifname . ether_addr
        elements = {{ {macs} }}
    }}
    set addresses {{
        type ifname . ipv4_addr
        {f"elements = {{ {addresses} }}" if addresses else ""}
    }}
    chain from_guests {{
        type filter hook prerouting priority -300; policy accept;
        iifname != {{ {names} }} accept
        iifname . ether saddr != @macs drop
        ether type != {{ arp, ip, ip6 }} drop
        ether type arp iifname . arp saddr ether != @macs drop
        ether type ip udp sport 67 drop
        ether type ip6 udp sport 547 drop
        ether type ip6 icmpv6 type {{ nd-router-advert, nd-redirect }} drop{of_fixed if fixed else ""}
    }}
{impaired(taps, (), limits)}}}
"""


def joined(network: Network, tap: Port, *, mtu: int) -> str:
    """For `ip -batch`. A bridge takes the lowest hardware address of its ports and the smallest MTU: ours change
    neither.
    """
    return f"""link set {tap.tap} address fe{tap.mac[2:]} mtu {mtu} addrgenmode none
link set {tap.tap} alias "{mark(network.id)} {tap.mac} {tap.address}"
link set {tap.tap} master {network.bridge} up
"""


def taps_of(network_id: str, shown: bytes) -> list[Port]:
    """From `ip -j link show type tun`."""
    return [Port(tap=link["ifname"], mac=mac, address=address) for link, mac, address in _ours(network_id, shown)]


def _ours(network_id: str, shown: bytes) -> list[tuple[dict[str, Any], str, str]]:
    found = []
    for link in json.loads(shown or b"[]"):
        whose, _, card = link.get("ifalias", "").partition(" ")
        if whose == mark(network_id):
            mac, _, address = card.partition(" ")
            found.append((link, mac, address))
    return found


def is_there(bridge: str) -> bool:
    return Path("/sys/class/net", bridge, "bridge").is_dir()


async def check(bridge: str) -> int:
    """The bridge's MTU. Raises `NotFound` when this computer has none of that name."""
    shown = await process.run(["ip", "-j", "link", "show", "type", "bridge"])
    there = {link["ifname"]: int(link["mtu"]) for link in json.loads(shown.stdout or b"[]")}
    if bridge not in there:
        names = f"there is {', '.join(there)}" if there else "it has no bridge at all"
        raise NotFound(
            f"this computer has no bridge '{bridge}'",
            names,
            f"Make it where its network is set up; to try it: `ip link add {bridge} type bridge`.",
        )
    return there[bridge]


async def add_tap(members: Members, mac: str, address: str) -> int:
    """A tap on the bridge, guarded, as an open descriptor: it goes with that. Raises `NotFound`, `NetworkFailed`."""
    network = members.network
    mtu = await check(network.bridge)
    tap = Port(tap=f"{TAP}{secrets.token_hex(6)}", mac=mac, address=address)
    try:
        descriptor = namespace.make_tap(tap.tap)
    except OSError as error:
        raise NetworkFailed("a network tap can't be made", str(error), "Run `atoll doctor`.") from error
    try:
        # Guarded first: nothing that it says passes before.
        await _guard(members, [*await _taps(network.id), tap])
        await process.run(["ip", "-batch", "-"], stdin=joined(network, tap, mtu=mtu).encode())
    except BaseException:
        os.close(descriptor)
        await mend(members)
        raise
    return descriptor


async def mend(members: Members) -> None:
    """Rules as they shall be for the taps that there are, and none without; idempotent."""
    await _guard(members, await _taps(members.network.id))


async def end(network: Network) -> None:
    """Take it all away, also the cables of guests that don't let go of their cards; idempotent."""
    for tap in await _taps(network.id):
        await process.run(["ip", "link", "delete", tap.tap], check=False)
    await _guard(Members(network=network), [])


async def _taps(network_id: str) -> list[Port]:
    return taps_of(network_id, (await process.run(["ip", "-j", "link", "show", "type", "tun"])).stdout)


async def _guard(members: Members, taps: Sequence[Port]) -> None:
    table = group_table(members.network.id)
    there = await process.run(["nft", "-t", "-j", "list", "table", "bridge", table], check=False)
    try:
        await process.run(["nft", "-f", "-"], stdin=rules(members, taps, there.stdout).encode())
    except ProcessFailed as error:
        raise NetworkFailed("VMs on a bridge can't be guarded", error.why, "Run `atoll doctor`.") from error


async def counters(network_id: str) -> dict[str, Counted]:
    """What has passed through each card that has a cable here, by its hardware address."""
    shown = await process.run(["ip", "-j", "-s", "link", "show", "type", "tun"])
    return {mac: counted(link) for link, mac, _ in _ours(network_id, shown.stdout)}
