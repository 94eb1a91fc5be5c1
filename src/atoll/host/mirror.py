"""A link by which QEMU shows us what passes through a card, and which never holds it up.

QEMU's `filter-mirror` writes each frame to a socket, and waits for as long as that is full: with a pipe or a Unix
socket a reader that is slow, or stopped by Ctrl-Z, would stop the guest. A UDP socket loses what nobody reads instead,
and the kernel counts it and tells when each came. Both ends are in a network namespace where nothing else is: through
its end QEMU, which may make no sockets, reaches nobody but us.
"""

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

from msgspec import Struct

from atoll.host import namespace

LARGEST_FRAME = 1 << 17
_ROOM = 16 << 20
"""Bytes that may wait for us. An ordinary user gets less (net.core.rmem_max)."""
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1
"""SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP (linux/sockios.h, if.h)."""
_ROOM_BY_FORCE, _TELL_TIME, _TELL_LOST = 33, 35, 40
"""SO_RCVBUFFORCE, SO_TIMESTAMPNS, SO_RXQ_OVFL (asm-generic/socket.h)."""


class Frame(Struct, frozen=True):
    at: tuple[int, int]
    """Seconds and nanoseconds."""
    content: bytes


def link() -> tuple[socket.socket, socket.socket]:
    """Our end, and QEMU's. Raises `NetworkFailed`."""
    ours, theirs = (socket.socket(fileno=each) for each in namespace.open_inside(None, _pair, "a link for captures"))
    ours.setblocking(False)
    try:
        ours.setsockopt(socket.SOL_SOCKET, _ROOM_BY_FORCE, _ROOM)
    except PermissionError:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
    for option in (_TELL_TIME, _TELL_LOST):
        ours.setsockopt(socket.SOL_SOCKET, option, 1)
    return ours, theirs


def _pair() -> list[int]:
    pair = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    request = struct.pack("16sH22x", b"lo", 0)
    flags = struct.unpack_from("H", fcntl.ioctl(pair[0], _GET_FLAGS, request), 16)[0]
    fcntl.ioctl(pair[0], _SET_FLAGS, struct.pack("16sH22x", b"lo", flags | _UP))
    for end in pair:
        end.bind(("127.0.0.1", 0))
    for end, other in (pair, pair[::-1]):
        end.connect(other.getsockname())
    return [os.dup(end.fileno()) for end in pair]


def is_cut(ours: socket.socket) -> bool:
    """Whether QEMU has let go of its end: then a word to it comes back."""
    try:
        ours.send(b"")
        ours.send(b"")
    except ConnectionRefusedError:
        return True
    return False


class Reader:
    """Frames out of what arrives: before each, two numbers tell its length and that of the virtio header in front."""

    def __init__(self, ours: socket.socket) -> None:
        self.socket = ours
        self._header = 0
        self.lost = 0

    def waiting(self) -> Iterator[Frame]:
        """Those that have come. Numbers that were lost make no difference: each message is one thing."""
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            while True:
                message, ancillary, _, _ = self.socket.recvmsg(LARGEST_FRAME, 128)
                at = (0, 0)
                for _, kind, data in ancillary:
                    if kind == _TELL_TIME:
                        at = struct.unpack("qq", data)
                    elif kind == _TELL_LOST:
                        self.lost = struct.unpack("I", data)[0]
                if len(message) == 4:
                    number = int.from_bytes(message, "big")
                    self._header = number if number < _SHORTEST_FRAME else self._header
                else:
                    yield Frame(at, message[self._header :])


_SHORTEST_FRAME = 14
"""A header of Ethernet; those of virtio have 10 or 12 bytes."""


def pcap_header() -> bytes:
    """Of a file with times in nanoseconds (draft-ietf-opsawg-pcap)."""
    return struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, LARGEST_FRAME, 1)


def pcap_record(frame: Frame) -> bytes:
    return struct.pack("=IIII", *frame.at, len(frame.content), len(frame.content)) + frame.content
