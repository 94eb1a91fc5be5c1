"""What nft is told of security groups. Pure: golden files check it.

On networks of ours a card without a group isn't spoken of. On a bridge of this computer's strangers are on the wire, so
there such a card lets in its neighbours and answers only.

Bridges know no connections without a module that few kernels have, so each card has sets of its own in which the
kernel notes what it has let through: what was opened by the guest, what by others, pings, and packets in pieces. An
answer is what fits a note. The table's rules are made anew in one transaction, while its notes stay.
"""

import json
from collections.abc import Iterable, Sequence

from msgspec import Struct

from atoll.host.link_text import Port
from atoll.model.groups import ANY, GROUP, LABEL, Rule
from atoll.model.network import Attached, Members

TABLE = "groups"
NOTES = 16384
"""Most connections that are noted for a card in each direction. They are the card's own, so that a guest which fills
them harms itself only.
"""
KNOWN_TIME = "1h"
"""How long a TCP connection may be silent. After that its guest has to speak first."""


NEEDED = (
    "ether type arp accept",
    # Of DHCPv6, whose servers are asked by multicast; and what keeps multicast, so neighbour discovery, alive.
    "ether type ip6 udp sport 547 udp dport 546 accept",
    "ether type ip6 icmpv6 type mld-listener-query accept",
    "ether type ip meta l4proto igmp accept",
)
"""What each guest on a network with strangers needs to hear, besides what all guests do."""


class Family(Struct, frozen=True, kw_only=True):
    """IPv4 or IPv6, in nft's words."""

    ip: str
    mark: str
    """In the names of chains and sets."""
    icmp: str
    errors: str
    basic_out: str
    basic_in: str
    """What every guest needs to have an address at all."""
    later_piece: str
    first_piece: str
    piece: str


IPV4 = Family(
    ip="ip",
    mark="",
    icmp="icmp",
    errors="destination-unreachable, time-exceeded, parameter-problem",
    basic_out="udp sport 68 udp dport 67",
    basic_in="udp sport 67 udp dport 68",
    later_piece="ip frag-off & 0x1fff != 0",
    first_piece="ip frag-off & 0x2000 != 0",
    piece="ip saddr . ip daddr . ip id",
)
IPV6 = Family(
    ip="ip6",
    mark="6",
    icmp="icmpv6",
    errors="destination-unreachable, packet-too-big, time-exceeded, parameter-problem",
    basic_out="icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }",
    basic_in="icmpv6 type { nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert }",
    later_piece="frag frag-off != 0",
    first_piece="frag more-fragments 1",
    piece="ip6 saddr . ip6 daddr . frag id",
)


class Where(Struct, frozen=True, kw_only=True):
    """A network, as rules see it."""

    members: Members
    taps: dict[str, str]
    """Of all its cards that are here, by hardware address."""

    @property
    def shared(self) -> bool:
        """With strangers, on a bridge of this computer's."""
        return self.members.network.mode == "bridge"


def groups(members: Members, ports: Sequence[Port], there: bytes = b"", *, table: str = TABLE) -> str:
    """For nft: the table that lets to and from each card what its groups say. `there` is what `nft -j` tells of the
    one before, whose notes on cards that are gone go, too.
    """
    where = Where(members=members, taps={port.mac: port.tap for port in ports})
    named = {each.mac: each.groups for each in members.attached if each.groups}
    kept = [(port.tap, named.get(port.mac, ())) for port in ports if where.shared or port.mac in named]
    if not kept:
        return f"table bridge {table}\ndelete table bridge {table}\n"
    taps = [tap for tap, _ in kept]
    gone = [
        f"delete {kind} bridge {table} {name}\n" for kind, name in _parts(there) if name.rpartition("_")[2] not in taps
    ]
    families = (IPV4, IPV6) if members.network.subnet6 or where.shared else (IPV4,)
    return (
        f"table bridge {table}\nflush table bridge {table}\n{''.join(gone)}table bridge {table} {{\n"
        + "".join(_of_card(where, of_card, tap, family) for tap, of_card in kept for family in families)
        + (_doors_shared if where.shared else _doors)(taps, families)
        + "}\n"
    )


def _doors(taps: Sequence[str], families: Sequence[Family]) -> str:
    out, into = _ways(taps, families)
    return _door("from_guests", "prerouting", -290, out) + _door("to_guests", "postrouting", 10, into)


def _doors_shared(taps: Sequence[str], families: Sequence[Family]) -> str:
    """Where a frame comes from and goes to is known together only while it is forwarded. What comes from, or goes to,
    this computer isn't.
    """
    out, into = _ways(taps, families)
    into = [f"oifname != {_these(taps)} accept", *NEEDED, "ether type != { ip, ip6 } drop", *into]
    return (
        _door("from_guests", "forward", -10, out)
        + _door("from_guests_to_host", "input", -10, out)
        + _door("to_guests", "forward", 10, into)
        + _door("to_guests_from_host", "output", 10, into)
    )


def _ways(taps: Sequence[str], families: Sequence[Family]) -> tuple[list[str], list[str]]:
    out = [_to_chains(family, "iifname", "out", taps) for family in families]
    return out, [_to_chains(family, "oifname", "in", taps) for family in families]


def _parts(there: bytes) -> list[tuple[str, str]]:
    """The chains and sets of single cards, chains first: they use the sets."""
    found = json.loads(there)["nftables"] if there.strip() else []
    return [
        (kind, each[kind]["name"])
        for kind in ("chain", "set")
        for each in found
        if kind in each and "hook" not in each[kind]
    ]


def _door(name: str, hook: str, priority: int, lines: list[str]) -> str:
    return _chain(name, [f"type filter hook {hook} priority {priority};", *lines])


def _these(taps: Iterable[str]) -> str:
    return f"{{ {', '.join(f'{chr(34)}{tap}{chr(34)}' for tap in taps)} }}"


def _to_chains(family: Family, which: str, direction: str, taps: Sequence[str]) -> str:
    targets = ", ".join(f'"{tap}" : goto {direction}{family.mark}_{tap}' for tap in taps)
    return f"ether type {family.ip} {which} vmap {{ {targets} }}"


def _chain(name: str, lines: list[str]) -> str:
    return f"    chain {name} {{\n{''.join(f'        {line}{chr(10)}' for line in lines)}    }}\n"


def _of_card(where: Where, named: Sequence[str], tap: str, family: Family) -> str:
    known = {group.name: group for group in where.members.groups}
    rules = [rule for name in named if name in known for rule in known[name].rules]
    out, into = (
        [line for rule in rules if rule.direction == direction for line in _rule(where, rule, family, tap)]
        for direction in ("out", "in")
    )
    of = f"{family.mark}_{tap}"
    chains = {
        f"keep{of}": [f"{family.first_piece} update @pieces{of} {{ {family.piece} }}", "accept"],
        f"pass_out{of}": _noted("own", of, family, "daddr"),
        f"pass_in{of}": _noted("others", of, family, "saddr"),
        f"out{of}": [*_known(of, family, "daddr"), *out, f"goto pass_out{of}"],
        f"in{of}": [
            *_known(of, family, "saddr"),
            f"{family.icmp} type {{ {family.errors} }} accept",
            *into,
            *(f"{match} goto pass_in{of}" for match in _let_in_besides(where, named, family)),
            "drop",
        ],
    }
    return _sets(of, family) + "".join(_chain(name, lines) for name, lines in chains.items())


def _let_in_besides(where: Where, named: Sequence[str], family: Family) -> list[str]:
    if where.shared:
        return [] if named else [f"iifname {_these(where.taps.values())}"]
    # Guests have addresses of the subnet only, or none yet, so what else comes does so through a published port.
    return [f"ip saddr != {{ 0.0.0.0, {where.members.network.subnet} }}"] if family is IPV4 else []


def _sets(of: str, family: Family) -> str:
    """What is noted of a card, how many, and for how long."""
    connection = _key(family, "daddr")
    notes = {
        "own": (connection, NOTES, "2m"),
        "others": (connection, NOTES, "2m"),
        "closing": (connection, NOTES, "1m"),
        "pings": (f"{family.ip} daddr . {family.icmp} id", NOTES // 16, "30s"),
        "pieces": (family.piece, NOTES // 16, "30s"),
    }
    return "".join(
        f"    set {name}{of} {{\n        typeof {what}\n        size {size}\n        flags dynamic,timeout\n"
        f"        timeout {timeout}\n    }}\n"
        for name, (what, size, timeout) in notes.items()
    )


def _key(family: Family, peer: str) -> str:
    """A connection as a note has it: with the other end first, whatever the direction of the packet."""
    ports = "th dport . th sport" if peer == "daddr" else "th sport . th dport"
    return f"{family.ip} {peer} . meta l4proto . {ports}"


def _known(of: str, family: Family, peer: str) -> list[str]:
    """Answers pass. What opens a TCP connection, or asks for an echo, is none."""
    key, answer, keep = _key(family, peer), "tcp flags & (syn | ack) != syn", f"goto keep{of}"
    lines = [
        f"{family.basic_out if peer == 'daddr' else family.basic_in} accept",
        f"{family.later_piece} {family.piece} @pieces{of} accept",
        f"{family.later_piece} drop",
        f"{family.icmp} type echo-reply {family.ip} {peer} . {family.icmp} id @pings{of} {keep}",
        f"{answer} {key} @closing{of} update @closing{of} {{ {key} }} {keep}",
    ]
    for notes in (f"@own{of}", f"@others{of}"):
        lines += [
            f"tcp flags & (fin | rst) != 0 {key} {notes} delete {notes} {{ {key} }}"
            f" update @closing{of} {{ {key} }} {keep}",
            f"{answer} {key} {notes} update {notes} {{ {key} timeout {KNOWN_TIME} }} {keep}",
            f"meta l4proto udp {key} {notes} update {notes} {{ {key} }} {keep}",
        ]
    return lines


def _noted(notes: str, of: str, family: Family, peer: str) -> list[str]:
    """What opens a connection is noted, so that its answers are known. Where there is no more room, they aren't."""
    key = _key(family, peer)
    return [
        f"meta l4proto tcp delete @closing{of} {{ {key} }}",
        f"meta l4proto {{ tcp, udp }} update @{notes}{of} {{ {key} }}",
        f"{family.icmp} type echo-request update @pings{of} {{ {family.ip} {peer} . {family.icmp} id }}",
        f"goto keep{of}",
    ]


def _rule(where: Where, rule: Rule, family: Family, tap: str) -> list[str]:
    """As nft writes it; nothing when it means nobody."""
    match = []
    if rule.protocol == "icmp":
        match = [f"meta l4proto {family.icmp}"]
    elif rule.ports:
        ports = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in rule.ports)
        match = [f"{rule.protocol} dport {{ {ports} }}"]
    elif rule.protocol != ANY:
        match = [f"meta l4proto {rule.protocol}"]
    if rule.peer != ANY:
        peer = _peer(where, rule, family)
        if peer is None:
            return []
        match.append(peer)
    passed = f"goto pass_{rule.direction}{family.mark}_{tap}"
    return [" ".join([*match, "drop" if rule.action == "deny" else passed])]


def _peer(where: Where, rule: Rule, family: Family) -> str | None:
    """Whom a rule means, of those that are there. Addresses that aren't ours to give are nobody's: cables are."""
    side, cable = ("saddr", "iifname") if rule.direction == "in" else ("daddr", "oifname")
    cards = _meant(where.members.attached, rule.peer)
    if cards is not None and where.shared:
        taps = [where.taps[card.mac] for card in cards if card.mac in where.taps]
        return f"{cable} {_these(taps)}" if taps else None
    peers = [rule.peer] if cards is None else [each for card in cards for each in (card.address, card.address6)]
    fit = [each for each in peers if each and (":" in each) is (family is IPV6)]
    return f"{family.ip} {side} {{ {', '.join(fit)} }}" if fit else None


def _meant(attached: Sequence[Attached], peer: str) -> list[Attached] | None:
    """The cards that a rule means; None where it means addresses."""
    if peer.startswith(GROUP):
        return [each for each in attached if peer.removeprefix(GROUP) in each.groups]
    if peer.startswith(LABEL):
        key, equals, value = peer.removeprefix(LABEL).partition("=")
        return [each for each in attached if (each.labels.get(key) == value if equals else key in each.labels)]
    return None
