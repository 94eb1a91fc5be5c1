"""What nft is told of security groups. Pure: golden files check it.

Bridges know no connections without a module that few kernels have, so each card has sets of its own in which the
kernel notes what it has let through: what was opened by the guest, what by others, pings, and packets in pieces. An
answer is what fits a note. The table's rules are made anew in one transaction, while its notes stay.
"""

import json
from collections.abc import Iterable, Sequence

from atoll.host.network_text import Port
from atoll.model.groups import ANY, GROUP, LABEL, Group, Rule
from atoll.model.network import Attached, Members

TABLE = "groups"
NOTES = 16384
"""Most connections that are noted for a card in each direction. They are the card's own, so that a guest which fills
them harms itself only.
"""
KNOWN_TIME = "1h"
"""How long a TCP connection may be silent. After that its guest has to speak first."""
_CONNECTION, _PIECE = "ip daddr . meta l4proto . th dport . th sport", "ip saddr . ip daddr . ip id"
_SETS = {
    "own": (_CONNECTION, NOTES, "2m"),
    "others": (_CONNECTION, NOTES, "2m"),
    "closing": (_CONNECTION, NOTES, "1m"),
    "pings": ("ip daddr . icmp id", NOTES // 16, "30s"),
    "pieces": (_PIECE, NOTES // 16, "30s"),
}
"""What is noted, of how many, for how long."""


def groups(members: Members, ports: Iterable[Port], there: bytes = b"") -> str:
    """For nft: the table that lets to and from each card what its groups say. `there` is what `nft -j` tells of the
    one before, whose notes on cards that are gone go, too.
    """
    cards = {each.mac: each for each in members.attached if each.groups}
    kept = [(port, cards[port.mac]) for port in ports if port.mac in cards]
    if not kept:
        return f"table bridge {TABLE}\ndelete table bridge {TABLE}\n"
    taps = {port.tap for port, _ in kept}
    gone = [
        f"delete {kind} bridge {TABLE} {name}\n" for kind, name in _parts(there) if name.rpartition("_")[2] not in taps
    ]
    doors = [
        _door("from_guests", "prerouting", -290, "iifname", {port.tap: f"out_{port.tap}" for port, _ in kept}),
        _door("to_guests", "postrouting", 10, "oifname", {port.tap: f"in_{port.tap}" for port, _ in kept}),
    ]
    return (
        f"table bridge {TABLE}\nflush table bridge {TABLE}\n{''.join(gone)}table bridge {TABLE} {{\n"
        + "".join(_of_card(members, port.tap, card) for port, card in kept)
        + f"{''.join(doors)}}}\n"
    )


def _parts(there: bytes) -> list[tuple[str, str]]:
    """The chains and sets of single cards, chains first: they use the sets."""
    found = json.loads(there)["nftables"] if there.strip() else []
    return [
        (kind, each[kind]["name"])
        for kind in ("chain", "set")
        for each in found
        if kind in each and "hook" not in each[kind]
    ]


def _door(name: str, hook: str, priority: int, which: str, chains: dict[str, str]) -> str:
    targets = ", ".join(f'"{tap}" : goto {chain}' for tap, chain in chains.items())
    return f"""    chain {name} {{
        type filter hook {hook} priority {priority};
        ether type ip {which} vmap {{ {targets} }}
    }}
"""


def _of_card(members: Members, tap: str, card: Attached) -> str:
    known = {group.name: group for group in members.groups}
    rules = [rule for name in card.groups for rule in known.get(name, Group(name=name, created_at=0)).rules]
    out = [line for rule in rules if rule.direction == "out" for line in _rule(members, rule, f"pass_out_{tap}")]
    into = [line for rule in rules if rule.direction == "in" for line in _rule(members, rule, f"pass_in_{tap}")]
    sets = [
        f"    set {name}_{tap} {{\n        typeof {of}\n        size {size}\n        flags dynamic,timeout\n"
        f"        timeout {timeout}\n    }}\n"
        for name, (of, size, timeout) in _SETS.items()
    ]
    here = members.network
    chains = {
        f"keep_{tap}": [f"ip frag-off & 0x2000 != 0 update @pieces_{tap} {{ {_PIECE} }}", "accept"],
        f"pass_out_{tap}": _noted("own", tap, "daddr"),
        f"pass_in_{tap}": _noted("others", tap, "saddr"),
        f"out_{tap}": ["udp sport 68 udp dport 67 accept", *_known(tap, "daddr"), *out, f"goto pass_out_{tap}"],
        f"in_{tap}": [
            f"ip saddr {here.gateway} udp sport 67 udp dport 68 accept",
            *_known(tap, "saddr"),
            "icmp type { destination-unreachable, time-exceeded, parameter-problem } accept",
            *into,
            # Guests have addresses of the subnet only, or none yet, so this comes through a published port.
            f"ip saddr != {{ 0.0.0.0, {here.subnet} }} goto pass_in_{tap}",
            "drop",
        ],
    }
    return "".join(sets) + "".join(
        f"    chain {name} {{\n{''.join(f'        {line}{chr(10)}' for line in lines)}    }}\n"
        for name, lines in chains.items()
    )


def _key(peer: str) -> str:
    """A connection as a note has it: with the other end first, whatever the direction of the packet."""
    ports = "th dport . th sport" if peer == "daddr" else "th sport . th dport"
    return f"ip {peer} . meta l4proto . {ports}"


def _known(tap: str, peer: str) -> list[str]:
    """Answers pass. What opens a TCP connection, or asks for an echo, is none."""
    key, answer, keep = _key(peer), "tcp flags & (syn | ack) != syn", f"goto keep_{tap}"
    lines = [
        f"ip frag-off & 0x1fff != 0 {_PIECE} @pieces_{tap} accept",
        "ip frag-off & 0x1fff != 0 drop",
        f"icmp type echo-reply ip {peer} . icmp id @pings_{tap} {keep}",
        f"{answer} {key} @closing_{tap} update @closing_{tap} {{ {key} }} {keep}",
    ]
    for notes in (f"@own_{tap}", f"@others_{tap}"):
        lines += [
            f"tcp flags & (fin | rst) != 0 {key} {notes} delete {notes} {{ {key} }}"
            f" update @closing_{tap} {{ {key} }} {keep}",
            f"{answer} {key} {notes} update {notes} {{ {key} timeout {KNOWN_TIME} }} {keep}",
            f"meta l4proto udp {key} {notes} update {notes} {{ {key} }} {keep}",
        ]
    return lines


def _noted(notes: str, tap: str, peer: str) -> list[str]:
    """What opens a connection is noted, so that its answers are known. Where there is no more room, they aren't."""
    return [
        f"meta l4proto tcp delete @closing_{tap} {{ {_key(peer)} }}",
        f"meta l4proto {{ tcp, udp }} update @{notes}_{tap} {{ {_key(peer)} }}",
        f"icmp type echo-request update @pings_{tap} {{ ip {peer} . icmp id }}",
        f"goto keep_{tap}",
    ]


def _rule(members: Members, rule: Rule, passed: str) -> list[str]:
    """As nft writes it; nothing when it means nobody."""
    match = [] if rule.protocol == ANY else [f"meta l4proto {rule.protocol}"]
    if rule.ports:
        ports = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in rule.ports)
        match = [f"{rule.protocol} dport {{ {ports} }}"]
    if rule.peer != ANY:
        peers = _addresses(members.attached, rule.peer)
        if not peers:
            return []
        match.append(f"ip {'saddr' if rule.direction == 'in' else 'daddr'} {{ {', '.join(peers)} }}")
    return [" ".join([*match, "drop" if rule.action == "deny" else f"goto {passed}"])]


def _addresses(attached: Sequence[Attached], peer: str) -> list[str]:
    """Who is meant, of those on the network."""
    if peer.startswith(GROUP):
        return [each.address for each in attached if peer.removeprefix(GROUP) in each.groups]
    if peer.startswith(LABEL):
        key, equals, value = peer.removeprefix(LABEL).partition("=")
        return [each.address for each in attached if (each.labels.get(key) == value if equals else key in each.labels)]
    return [peer]
