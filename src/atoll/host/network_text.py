"""What `ip`, nft and dnsmasq are told for a network, as text. Pure: golden files check it."""

import json
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from atoll.model.network import Attached, Impairment, Network

BRIDGE, UPLINK = "br0", "up0"
TAP, INNER, OUTER, PRIVATE = "t", "i", "r", "q"
"""What names begin with: of a card's tap; of a relay's two, and of the bridge of its own that the card is on then."""
LEASE_TIME = "1h"
BURST = 128 * 1024
"""Bytes that pass at once on a slow cable: two packets of the largest kind that guests hand over."""


class Link(Struct, frozen=True, kw_only=True):
    """An interface in the namespace."""

    name: str
    index: int
    master: str = ""
    mac: str = ""
    """Of the card that it is the cable of, with its address."""
    address: str = ""


class Port(Struct, frozen=True, kw_only=True):
    """A tap on the bridge, and what may come out of it."""

    tap: str
    mac: str
    address: str


def links(network: Network) -> str:
    """For `ip -batch`: the bridge, with the network's own address. No VM may be a part of a spanning tree.

    Without a hardware address of its own the bridge has that of a tap, and another one when that goes.
    """
    prefix = network.subnet.partition("/")[2]
    mac = ":".join(["02", *(network.id[index : index + 2] for index in range(0, 10, 2))])
    return f"""link set lo up
link add {BRIDGE} address {mac} type bridge stp_state 0 forward_delay 0 mcast_snooping 0
addr add {network.gateway}/{prefix} dev {BRIDGE}
link set {BRIDGE} up
"""


def rules(network: Network) -> str:
    """For nft: what may reach the network itself, and what may go through it.

    From VM to VM goes here only where somebody (Docker does) has loaded br_netfilter.
    """
    return f"""table inet atoll {{
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname {{ "lo", "{UPLINK}" }} accept
        iifname != "{BRIDGE}" drop
        ct state established,related accept
        ip protocol icmp accept
        meta l4proto {{ tcp, udp }} th dport 53 accept
        udp dport 67 accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "{BRIDGE}" oifname "{BRIDGE}" accept
        iifname "{PRIVATE}*" oifname "{PRIVATE}*" accept
        iifname "{BRIDGE}" oifname "{UPLINK}" ip saddr {network.subnet} accept
        iifname "{UPLINK}" oifname "{BRIDGE}" ip daddr {network.subnet} accept
    }}
    chain out {{
        type nat hook postrouting priority srcnat;
        oifname "{UPLINK}" masquerade
    }}
}}
{guards([])}"""


def guards(ports: Sequence[Port], impairments: Sequence[Impairment] = (), *, relayed: Sequence[Port] = ()) -> str:
    """For nft: the table that lets out of each tap only what its card may say. It takes the place of the one before.

    `relayed` are those of cards that are on a bridge of their own, with a relay's tap in their place on the network's.
    What isn't IPv4 or ARP isn't let through. A guest can't answer for DHCP. Cables that work badly do so here, too.
    """
    macs = ", ".join(f'"{port.tap}" . {port.mac}' for port in (*ports, *relayed))
    addresses = ", ".join(f'"{port.tap}" . {port.mac} . {port.address}' for port in (*ports, *relayed))
    return f"""table bridge atoll
delete table bridge atoll
table bridge atoll {{
    set macs {{
        type ifname . ether_addr
        {f"elements = {{ {macs} }}" if macs else ""}
    }}
    set addresses {{
        type ifname . ether_addr . ipv4_addr
        {f"elements = {{ {addresses} }}" if addresses else ""}
    }}
    chain from_guests {{
        type filter hook prerouting priority -300; policy drop;
        iifname "{INNER}*" accept
        iifname . ether saddr != @macs drop
        ether type arp iifname . arp saddr ether . arp saddr ip @addresses accept
        ether type ip udp sport 67 drop
        ether type ip ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
        ether type ip iifname . ether saddr . ip saddr @addresses accept
    }}
{_impaired(ports, impairments)}}}
"""


def _impaired(ports: Sequence[Port], impairments: Sequence[Impairment]) -> str:
    """Chains for what is lost on the way, before the guards and behind the bridge; nothing when nothing is."""
    taps: dict[str, list[str]] = {}
    for port in ports:
        taps.setdefault(port.mac, []).append(port.tap)
    both: list[str] = []
    cuts: list[str] = []
    for each in impairments:
        for tap in taps.get(each.mac, ()):
            others = [other for mac in each.cut_from for other in taps.get(mac, ())]
            cuts += [f'"{a}" . "{b}"' for other in others for a, b in ((tap, other), (other, tap))]
            if each.loss:
                both.append(f'name "{tap}" numgen random mod 10000 < {round(each.loss * 100)} drop')
            if each.rate:
                burst = max(BURST, each.rate // 10)
                both.append(f'name "{tap}" limit rate over {each.rate} bytes/second burst {burst} bytes drop')
    chains = [("to_network", "prerouting", -310, [f"iif{rule}" for rule in both])]
    chains += [("to_guests", "postrouting", 0, [f"oif{rule}" for rule in both])]
    if cuts:
        chains += [("between", "forward", 0, [f"iifname . oifname {{ {', '.join(sorted(set(cuts)))} }} drop"])]
    return "".join(
        f"    chain {name} {{\n        type filter hook {hook} priority {priority};\n"
        + "".join(f"        {rule}\n" for rule in rules)
        + "    }\n"
        for name, hook, priority, rules in chains
        if rules
    )


def joined(port: Port) -> str:
    """For `ip -batch`: a tap on the bridge. Its alias says what its card may say, so that the guards can be made anew
    from what is there.
    """
    return f"""link set {port.tap} alias {port.mac}/{port.address}
link set {port.tap} master {BRIDGE} up
"""


def private_bridge(tap: str) -> str:
    return PRIVATE + tap.removeprefix(TAP)


def relayed_cable(card: Link, *, inner: str, outer: str, bridge_there: bool) -> str:
    """For `ip -batch`: a card's tap goes to a bridge of its own, where nobody else speaks, and the relay's take its
    place.
    """
    bridge = private_bridge(card.name)
    made = f"link add {bridge} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n" if not bridge_there else ""
    return f"""{made}link set {bridge} arp off addrgenmode none up
link set {inner} master {bridge} up
link set {card.name} nomaster
link set {card.name} master {bridge} up
{joined(Port(tap=outer, mac=card.mac, address=card.address))}"""


def plain_cables(cards: Sequence[Link], unused: Sequence[str]) -> str:
    """For `ip -batch`: taps go back to the network's bridge, and bridges of their own go."""
    back = (f"link set {card.name} nomaster\nlink set {card.name} master {BRIDGE} up\n" for card in cards)
    return "".join((*back, *(f"link del {bridge}\n" for bridge in unused)))


def links_of(shown: bytes) -> list[Link]:
    """All of the namespace, from `ip -j link show`."""
    found = []
    for link in json.loads(shown or b"[]"):
        mac, _, address = link.get("ifalias", "").partition("/")
        found.append(
            Link(name=link["ifname"], index=link["ifindex"], master=link.get("master", ""), mac=mac, address=address)
        )
    return found


def ports_of(links: Sequence[Link]) -> list[Port]:
    """The cables on the network's bridge."""
    return [_port(link) for link in links if link.master == BRIDGE and link.address]


def relayed_of(links: Sequence[Link]) -> list[Port]:
    """The taps of cards that a relay stands in for."""
    return [_port(link) for link in links if link.master.startswith(PRIVATE) and link.address]


def _port(link: Link) -> Port:
    return Port(tap=link.name, mac=link.mac, address=link.address)


class Counted(Struct, frozen=True, kw_only=True):
    """What the card of a tap received and sent: bytes, then packets."""

    received: tuple[int, int]
    sent: tuple[int, int]


def counters_of(shown: bytes) -> dict[str, Counted]:
    """By hardware address, from `ip -j -s link show type tun`. What a card sends its tap receives."""
    found = {}
    for link in json.loads(shown or b"[]"):
        mac, _, address = link.get("ifalias", "").partition("/")
        if address and link["ifname"].startswith(TAP):
            found[mac] = counted(link)
    return found


def counted(link: dict[str, Any]) -> Counted:
    rx, tx = link["stats64"]["rx"], link["stats64"]["tx"]
    return Counted(received=(tx["bytes"], tx["packets"]), sent=(rx["bytes"], rx["packets"]))


_BOTH = f"""interface={BRIDGE}
bind-interfaces
"""


def dns(network: Network, *, hosts: str, upstream: str | None) -> str:
    """For the dnsmasq that knows names. `upstream` knows those of the world; names of the network never go there.

    Without one, whoever asks for another name is refused, and so asks the next server that he has.
    """
    world = f"domain-needed\nserver={upstream}\n" if upstream else ""
    return f"{_BOTH}no-hosts\nno-resolv\naddn-hosts={hosts}\nlocal=/{network.domain}/\n{world}"


def dhcp(network: Network, *, leases: str) -> str:
    """For the dnsmasq that gives each card its address. A private network has no way out to tell of."""
    return f"""{_BOTH}port=0
quiet-dhcp
no-ping
leasefile-ro
dhcp-authoritative
dhcp-range={network.subnet.partition("/")[0]},static,{_mask(network)},{LEASE_TIME}
dhcp-hostsfile={leases}
domain={network.domain}
dhcp-option=option:dns-server,{network.gateway}
dhcp-option=option:domain-search,{network.domain}
{"dhcp-option=option:router" if network.mode == "private" else ""}
"""


def _mask(network: Network) -> str:
    bits = 0xFFFFFFFF << (32 - int(network.subnet.partition("/")[2])) & 0xFFFFFFFF
    return ".".join(str(bits >> shift & 0xFF) for shift in (24, 16, 8, 0))


def resolver(network: Network) -> str:
    """For resolv.conf(5)."""
    return f"search {network.domain}\nnameserver {network.gateway}\n"


def name_switch(here: str) -> str:
    """This computer's nsswitch.conf(5), but that names are asked for by DNS."""
    return "".join(
        "hosts: files dns\n" if line.startswith("hosts:") else line for line in here.splitlines(keepends=True)
    )


def hosts(network: Network, attached: Sequence[Attached]) -> str:
    """For dnsmasq's DNS: each VM by its name and by that with the domain."""
    return "".join(f"{each.address} {each.vm} {each.vm}.{network.domain}\n" for each in attached)


def leases(attached: Sequence[Attached]) -> str:
    """For dnsmasq's DHCP: nobody else gets an address."""
    return "".join(f"{each.mac},{each.address}\n" for each in attached)
