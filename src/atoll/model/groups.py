"""Security groups: rules for what may reach a card and what it may reach, as text and as records. Pure.

allow in tcp 80,8000-8100 from any
deny out udp 53 to 10.0.0.0/8
allow in tcp 5432 from label:role=web
"""

import re
from collections.abc import Sequence
from typing import Literal, TypeGuard, get_args

from msgspec import Struct

from atoll.errors import InvalidInput
from atoll.model.names import shown

Action = Literal["allow", "deny"]
Direction = Literal["in", "out"]
Protocol = Literal["any", "tcp", "udp", "icmp"]
ANY = "any"
LABEL, GROUP = "label:", "group:"
LARGEST_PORT = 65535
MOST_RULES = 500

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?", re.ASCII)
_PORTS = re.compile(r"\d{1,5}(?:-\d{1,5})?(?:,\d{1,5}(?:-\d{1,5})?)*", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,62}(?:=\S*)?", re.ASCII)
_FORM = "Write it like `allow in tcp 80,8000-8100 from any` or `deny out udp 53 to 10.0.0.0/8`."


class Rule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is let through, or isn't. Its text is `str(rule)`."""

    action: Action
    direction: Direction
    protocol: Protocol = "any"
    ports: tuple[tuple[int, int], ...] = ()
    """The first and the last of each range; all ports when empty. They are those of who is connected to."""
    peer: str = ANY
    """`any`, a subnet, `label:KEY`, `label:KEY=VALUE`, or `group:NAME`."""

    def __str__(self) -> str:
        ports = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in self.ports)
        words = [self.action, self.direction, self.protocol, ports, _WORDS[self.direction], self.peer]
        return " ".join(word for word in words if word)


_WORDS: dict[Direction, str] = {"in": "from", "out": "to"}


class Group(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rules with a name; the first that fits says what happens."""

    name: str
    created_at: float
    rules: tuple[Rule, ...] = ()


class GroupInfo(Struct, frozen=True, kw_only=True):
    """A group as `net group ls` and `net group show` tell it."""

    name: str
    created_at: float
    rules: tuple[str, ...]
    vms: tuple[str, ...] = ()
    """Those that have a card with it."""


def check_name(name: str) -> str:
    """The name itself, or `InvalidInput`."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{shown(name)} can't be the name of a security group",
            "a name has up to 32 small letters (a-z), digits and '-'",
            "Choose another.",
        )
    return name


def parse_rule(text: str) -> Rule:
    """Raises `InvalidInput`."""
    words = text.split()
    action, direction, protocol, *rest = [*words, "", "", ""][: max(3, len(words))]
    if not _is_action(action):
        raise _wrong(text, "it starts with allow or deny")
    if not _is_direction(direction):
        raise _wrong(text, "its second word is in or out")
    if not _is_protocol(protocol):
        raise _wrong(text, f"its third word is a protocol: {', '.join(get_args(Protocol))}")
    ports: tuple[tuple[int, int], ...] = ()
    if rest and rest[0][:1].isdigit():
        ports = _ports(text, rest.pop(0))
        if protocol not in ("tcp", "udp"):
            raise _wrong(text, "only tcp and udp have ports")
    peer = ANY
    if rest:
        word = _WORDS[direction]
        if len(rest) != 2 or rest[0] != word:
            raise _wrong(text, f"after protocol and ports comes '{word}' and one peer")
        peer = _peer(text, rest[1])
    return Rule(action=action, direction=direction, protocol=protocol, ports=ports, peer=peer)


def _is_action(word: str) -> TypeGuard[Action]:
    return word in get_args(Action)


def _is_direction(word: str) -> TypeGuard[Direction]:
    return word in get_args(Direction)


def _is_protocol(word: str) -> TypeGuard[Protocol]:
    return word in get_args(Protocol)


def _ports(text: str, word: str) -> tuple[tuple[int, int], ...]:
    if not _PORTS.fullmatch(word):
        raise _wrong(text, f"{shown(word)} is no list of ports")
    found = []
    for each in word.split(","):
        low, _, high = each.partition("-")
        if not 1 <= int(low) <= int(high or low) <= LARGEST_PORT:
            raise _wrong(text, f"'{each}' is no port: they go from 1 to {LARGEST_PORT}")
        found.append((int(low), int(high or low)))
    return tuple(found)


def _peer(text: str, word: str) -> str:
    if word == ANY:
        return word
    if word.startswith(LABEL):
        if not _LABEL.fullmatch(word.removeprefix(LABEL)):
            raise _wrong(text, f"{shown(word)} names no label: write label:KEY or label:KEY=VALUE")
        return word
    if word.startswith(GROUP):
        return GROUP + check_name(word.removeprefix(GROUP))
    import ipaddress

    try:
        return str(ipaddress.ip_network(word))
    except ValueError as error:
        raise _wrong(
            text, f"{shown(word)} is neither any, a subnet ({error}), label:KEY=VALUE nor group:NAME"
        ) from error


def _wrong(text: str, why: str) -> InvalidInput:
    return InvalidInput(f"{shown(text)} is no rule", why, _FORM)


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """In their order. Raises `InvalidInput`."""
    if len(texts) > MOST_RULES:
        raise InvalidInput(f"a group has {MOST_RULES} rules at most", f"these are {len(texts)}", "Make several groups.")
    return tuple(parse_rule(text) for text in texts)


def named(rules: tuple[Rule, ...]) -> set[str]:
    """The groups that these rules mean."""
    return {rule.peer.removeprefix(GROUP) for rule in rules if rule.peer.startswith(GROUP)}
