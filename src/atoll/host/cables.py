"""Cables with a delay: which card's frames go through a relay (`host/relay.py`), and the links that takes.

What is wanted is in the network's file of impairments, what is there is asked: links from the kernel, relays and their
settings from their command lines. `mended` makes the one from the other, whatever was killed in between.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from atoll.host import cgroups, facts, helper_jail, link_text, namespace, relay
from atoll.host.link_text import BRIDGE, Link
from atoll.host.sandbox import own_ids
from atoll.host.spawn import Program, spawn
from atoll.layout import NetworkPaths
from atoll.model.network import Impairment

MARK = "atoll-relay"
"""The word before a network's id in the command line of its relays."""
_LINKS_CHANGE = 1
"""RTMGRP_LINK (rtnetlink.h)."""


async def mended(
    holder: int, paths: NetworkPaths, links: Sequence[Link], impairments: Sequence[Impairment]
) -> Sequence[Link]:
    """Let each card have the cable that it should; the links as they are then. Raises `NetworkFailed`."""
    wanted = {each.mac: each for each in impairments if each.relayed}
    running = relays_of(paths)
    if not wanted and not running and not any(link.name.startswith(link_text.PRIVATE) for link in links):
        return links
    cards = [link for link in links if link.name.startswith(link_text.TAP) and link.mac]
    settings = {card.name: _settings(card, wanted[card.mac]) for card in cards if card.mac in wanted}
    whole = {card.name for card in cards if _has_cable(card, links)}
    kept = {tap for tap, (_, told) in running.items() if settings.get(tap) == told and tap in whole}
    namespace.end_all([pid for tap, (pid, _) in running.items() if tap not in kept])
    plain = [card for card in cards if card.name not in settings and card.master != BRIDGE]
    used = {link_text.private_bridge(tap) for tap in settings}
    unused = [link.name for link in links if link.name.startswith(link_text.PRIVATE) and link.name not in used]
    await namespace.run(holder, "ip", "-batch", "-", stdin=link_text.plain_cables(plain, unused))
    for card in cards:
        if card.name in settings and card.name not in kept:
            await _start(holder, paths, card, settings[card.name], bridge_there=_private(card) in _names(links))
    return link_text.links_of((await namespace.run(holder, "ip", "-j", "link", "show")).stdout)


def _names(links: Sequence[Link]) -> set[str]:
    return {link.name for link in links}


def _has_cable(card: Link, links: Sequence[Link]) -> bool:
    """Whether its relay's outer tap is where a killed command may not have put it: that is done last."""
    return any(
        each.name.startswith(link_text.OUTER) and each.master == BRIDGE and each.mac == card.mac for each in links
    )


def _private(card: Link) -> str:
    return link_text.private_bridge(card.name)


def _settings(card: Link, impairment: Impairment) -> str:
    relayed = msgspec.to_builtins(impairment.relayed)
    return json.dumps({"index": card.index, "relayed": relayed}, sort_keys=True)


def relays_of(paths: NetworkPaths) -> Mapping[str, tuple[int, str]]:
    """By the tap of its card: a relay's pid and its settings."""
    found = {}
    ids = own_ids(paths.run.name)
    for pid in facts.scan_for(paths.run.name, after=MARK, also_user=ids.user if ids else None):
        with contextlib.suppress(OSError, IndexError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            at = words.index(MARK)
            found[words[at + 2]] = (pid, words[at + 3])
    return found


async def _start(holder: int, paths: NetworkPaths, card: Link, settings: str, *, bridge_there: bool) -> None:
    inner, outer = (f"{kind}{secrets.token_hex(6)}" for kind in (link_text.INNER, link_text.OUTER))
    opened = namespace.open_inside(
        holder, lambda: [namespace.make_tap(inner), namespace.make_tap(outer), _links_that_go()], "a relay"
    )
    try:
        _spawn(holder, paths, card.name, settings, opened)
    finally:
        for each in opened:
            os.close(each)
    text = link_text.relayed_cable(card, inner=inner, outer=outer, bridge_there=bridge_there)
    await namespace.run(holder, "ip", "-batch", "-", stdin=text)


def _links_that_go() -> int:
    told = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    told.bind((0, _LINKS_CHANGE))
    return told.detach()


def _spawn(holder: int, paths: NetworkPaths, tap: str, settings: str, opened: Sequence[int]) -> None:
    python = os.path.realpath(sys.executable)
    with contextlib.ExitStack() as stack:
        alive = os.open(paths.alive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, alive)
        # It reads its own text from there: our files may be nobody else's to read.
        text = stack.enter_context(Path(relay.__file__).open("rb"))
        log = stack.enter_context(paths.log.open("ab"))
        words = (MARK, paths.run.name, tap, settings, *(str(each) for each in (*opened, alive)))
        program = Program(
            argv=(python, "-I", "-S", "-", *words),
            descriptors=(*opened, alive),
            input=text.fileno(),
            output=log.fileno(),
            folder=str(paths.run),
        )
        groups = cgroups.entrances(paths.run.name)
        spawn(program, helper_jail.for_relay(python, holder=holder, groups=groups))


def end(paths: NetworkPaths) -> None:
    """They would end by themselves, a moment after the network."""
    namespace.end_all([pid for pid, _ in relays_of(paths).values()])
