"""The links of a network: what they are called, what `ip` is told of them and tells. Pure, as `network_text`."""

import json
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

BRIDGE, UPLINK = "br0", "up0"
TAP, INNER, OUTER, PRIVATE = "t", "i", "r", "q"
"""What names begin with: of a card's tap; of a relay's two, and of the bridge of its own that the card is on then."""


class Link(Struct, frozen=True, kw_only=True):
    """An interface in the namespace."""

    name: str
    index: int
    master: str = ""
    mac: str = ""
    """Of the card that it is the cable of, with its addresses."""
    address: str = ""
    address6: str = ""


class Port(Struct, frozen=True, kw_only=True):
    """A tap on the bridge, and what may come out of it."""

    tap: str
    mac: str
    address: str
    address6: str = ""


def joined(port: Port) -> str:
    """For `ip -batch`: a tap on the bridge. Its alias says what its card may say, so that the guards can be made anew
    from what is there. The network itself may still know the address as that of a card before.
    """
    return f"""link set {port.tap} alias {port.mac}/{port.address}/{port.address6}
link set {port.tap} master {BRIDGE} up
neigh replace {port.address} lladdr {port.mac} nud stale dev {BRIDGE}
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
{joined(replace(_port(card), tap=outer))}"""


def plain_cables(cards: Sequence[Link], unused: Sequence[str]) -> str:
    """For `ip -batch`: taps go back to the network's bridge, and bridges of their own go."""
    back = (f"link set {card.name} nomaster\nlink set {card.name} master {BRIDGE} up\n" for card in cards)
    return "".join((*back, *(f"link del {bridge}\n" for bridge in unused)))


def links_of(shown: bytes) -> list[Link]:
    """All of the namespace, from `ip -j link show`."""
    found = []
    for link in json.loads(shown or b"[]"):
        mac, _, addresses = link.get("ifalias", "").partition("/")
        address, _, address6 = addresses.partition("/")
        found.append(
            Link(
                name=link["ifname"],
                index=link["ifindex"],
                master=link.get("master", ""),
                mac=mac,
                address=address,
                address6=address6,
            )
        )
    return found


def ports_of(links: Sequence[Link]) -> list[Port]:
    """The cables on the network's bridge."""
    return [_port(link) for link in links if link.master == BRIDGE and link.address]


def relayed_of(links: Sequence[Link]) -> list[Port]:
    """The taps of cards that a relay stands in for."""
    return [_port(link) for link in links if link.master.startswith(PRIVATE) and link.address]


def _port(link: Link) -> Port:
    return Port(tap=link.name, mac=link.mac, address=link.address, address6=link.address6)


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
