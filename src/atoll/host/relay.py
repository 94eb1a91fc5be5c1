"""A program of its own: carries frames between a card and its network as a bad cable would.

    card's tap ── private bridge ── inner tap ══ this ══ outer tap ── the network's bridge

It is started shut in (`host/helper_jail.py`), with nothing but open descriptors (`host/cables.py` says which), and
imports nothing of ours. It ends with the network, or when the card's tap goes. Frames are carried with the header that
tells what is left to do for them (large segments, checksums), so nothing has to be computed.
"""

import contextlib
import errno
import fcntl
import heapq
import json
import os
import random
import selectors
import socket
import struct
import sys
import time
from typing import Any

HEADER = 10
"""Bytes of virtio's header in front of each frame."""
LARGEST_FRAME = 1 << 17
ROOM = 16 << 20
"""Bytes that may be on their way in one direction; what is more is lost."""
KEPT_BACK = 0.02
"""Seconds by which a frame is later when those behind it shall overtake it."""
_AT_ONCE = 64
_SET_OFFLOADS, _OFFLOADS = 0x400454D0, 0x0F
"""TUNSETOFFLOAD with checksums and large TCP segments (if_tun.h)."""
_LINK_GONE = 17
"""RTM_DELLINK (rtnetlink.h)."""

Shape = dict[str, Any]
"""A `Relayed` of `model/network.py`."""


class Direction:
    """What goes one way. Delays keep the order: a frame never overtakes another, unless it shall."""

    def __init__(self, source: int, target: int, *, peer_at: int, shapes: dict[str | None, Shape]) -> None:
        self.source = source
        self._target = target
        self._peer = slice(HEADER + peer_at, HEADER + peer_at + 6)
        self._shapes = shapes
        self._waiting: list[tuple[float, int, bytes]] = []
        self._bytes = self._count = 0
        self._last: dict[str | None, float] = {}

    def take(self, now: float) -> None:
        """Read what has come, a bounded number of frames."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_AT_ONCE):
                self._accept(os.read(self.source, LARGEST_FRAME), now)

    def _accept(self, frame: bytes, now: float) -> None:
        peer: str | None = frame[self._peer].hex(":")
        peer = peer if peer in self._shapes else None
        shape = self._shapes.get(peer, {})
        if _happens(shape.get("loss", 0)):
            return
        delay, jitter = shape.get("delay", 0.0), shape.get("jitter", 0.0)
        due = now + max(0.0, delay + random.uniform(-jitter, jitter))
        if _happens(shape.get("reorder", 0)):
            due += KEPT_BACK
        else:
            due = self._last[peer] = max(due, self._last.get(peer, 0.0))
        for _ in range(2 if _happens(shape.get("duplicate", 0)) else 1):
            if self._bytes + len(frame) <= ROOM:
                heapq.heappush(self._waiting, (due, self._count, frame))
                self._count += 1
                self._bytes += len(frame)

    def give(self, now: float) -> float | None:
        """Write what is due; when the next will be."""
        while self._waiting and self._waiting[0][0] <= now:
            frame = heapq.heappop(self._waiting)[2]
            self._bytes -= len(frame)
            # What the other side can't take now is lost, as on a cable.
            with contextlib.suppress(OSError):
                os.write(self._target, frame)
        return self._waiting[0][0] if self._waiting else None


def _happens(percent: float) -> bool:
    return percent > 0 and random.random() * 100 < percent


def main(settings: Shape, inner: int, outer: int, links: int, alive: int) -> None:
    """`links` tells of links that go; `alive` is hung up when the network ends."""
    shapes = {each["peer"]: each for each in settings["relayed"]}
    ways = [
        Direction(inner, outer, peer_at=0, shapes=shapes),
        Direction(outer, inner, peer_at=6, shapes=shapes),
    ]
    for tap in (inner, outer):
        os.set_blocking(tap, False)
        fcntl.ioctl(tap, _SET_OFFLOADS, _OFFLOADS)
    selector = selectors.DefaultSelector()
    for each in (inner, outer, links, alive):
        selector.register(each, selectors.EVENT_READ)
    while True:
        now = time.monotonic()
        next_due = [due for way in ways if (due := way.give(now)) is not None]
        ready = {key.fd for key, _ in selector.select(max(0.0, min(next_due) - now) if next_due else None)}
        if alive in ready or (links in ready and _is_gone(links, settings["index"])):
            return
        for way in ways:
            if way.source in ready:
                way.take(time.monotonic())


def _is_gone(links: int, index: int) -> bool:
    """Whether one of the messages (netlink(7)) says that the card's tap is gone."""
    try:
        told = os.read(links, 1 << 16)
    except OSError as error:
        # More came than it could keep; then somebody mends this when he comes by.
        return error.errno != errno.ENOBUFS
    while len(told) >= 24:
        length, kind = struct.unpack_from("=IH", told)
        # A bridge tells in the same words, with a family of its own, that a link isn't its any more.
        if kind == _LINK_GONE and told[16] == socket.AF_UNSPEC and struct.unpack_from("=i", told, 20)[0] == index:
            return True
        told = told[(length + 3) & ~3 :]
    return False


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        # One of the taps was taken away.
        main(json.loads(sys.argv[4]), *(int(word) for word in sys.argv[5:9]))
