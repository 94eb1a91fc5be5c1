"""Which frames of a guest its user-mode network gets to see: a filter of the kernel's, on the helper's end of the link.

Slirp connects to whatever address a frame names. This host's own loopback is such an address: a guest that puts
127.0.0.1, ::1 or ::ffff:127.0.0.1 into a frame reaches what listens there for this computer only. The gateway's address
stands for the loopback as well; to forbid that, slirp has a switch, which would also forbid answers to who uses a port
that is published there by UDP. So what may pass is decided here, before slirp reads it:

    ARP, and nothing else that isn't IP
    IPv4 to everybody      asking for an address (DHCP)
    IPv4 inside 10.0.2/24  pings; DHCP to the gateway; DNS to the name server; of TCP all but the opening
                           of a connection; of UDP what goes from a published port to a client's
    IPv4 beyond            all but this host's loopback; of a restricted guest TCP alone, but for the opening
    IPv6                   all but this host's loopback, as an address of its own or under the prefix of the link

Fragments may hide what is looked at here, so that they pass only where nothing is looked at.
"""

import os
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from atoll.errors import EngineFailed
from atoll.host import descriptors

ATTACH = 26
"""SO_ATTACH_FILTER (asm-generic/socket.h); Python has no name for it."""
_LONGEST_WAIT = 20_000
"""Microseconds that the helper waits for a guest that takes no frames, a paused one say, before it drops a frame."""
FIRST_DESCRIPTORS = 32
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

# Classic BPF (linux/bpf_common.h): load a word, a half or a byte from a fixed place, or from one behind X; let X be the
# length of the IPv4 header; mask; jump if equal, if not less, if a bit is set; return.
_WORD, _HALF, _BYTE, _HALF_AT_X, _BYTE_AT_X, _X_IS_HEADER = 0x20, 0x28, 0x30, 0x48, 0x50, 0xB1
_AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x54, 0x15, 0x35, 0x45, 0x06
_PASS = 0xFFFFFFFF

# Places in a frame, and in what follows a header of IPv4 that begins at 14.
_KIND, _FRAGMENT, _PROTOCOL, _TO = 12, 20, 23, 30
_ASKED_FOR = 38
"""The address that an ARP request is about."""
_FROM_PORT, _TO_PORT, _FLAGS = 14, 16, 27
_NEXT_HEADER, _TO6, _TO_PORT6 = 20, 38, 56
_ICMP, _TCP, _UDP, _ICMP6 = 1, 6, 17, 58
_NETWORK, _GATEWAY, _NAMES = 0x0A000200, 0x0A000202, 0x0A000203
_SYN, _ACK = 0x02, 0x10

Step = tuple[str, int, int, str, str]
"""A label, an operation, its number, and where to go on if it holds and if not; `""` is no label, and the next step."""


class Rules(Struct, frozen=True, kw_only=True):
    """What differs between networks, and changes with their ports."""

    restrict: bool = False
    answers_from: tuple[int, ...] = ()
    """The guest's ports that are published by UDP."""
    clients_from: int = 32768
    """The first port that this host gives to clients."""


def steps(rules: Rules) -> list[Step]:
    """The filter, with labels. A load from behind a frame's end drops the frame."""
    return [
        ("", _HALF, _KIND, "", ""),
        ("", _EQUAL, 0x0806, "pass", ""),
        ("", _EQUAL, 0x0800, "ipv4", ""),
        ("", _EQUAL, 0x86DD, "drop" if rules.restrict else "ipv6", "drop"),
        *_of_ipv4(rules),
        *_of_ipv6(),
        ("pass", _RETURN, _PASS, "", ""),
        ("drop", _RETURN, 0, "", ""),
        # Behind all else: a jump spans 255 steps at most, and there may be many ports.
        ("answer", _HALF_AT_X, _FROM_PORT, "", ""),
        *(step for port in rules.answers_from for step in _passing_port(port)),
        ("", _RETURN, 0, "", ""),
    ]


def _passing_port(port: int) -> Sequence[Step]:
    return ("", _EQUAL, port, "", "+1"), ("", _RETURN, _PASS, "", "")


def _of_ipv4(rules: Rules) -> list[Step]:
    beyond: list[Step] = [("beyond", _RETURN, _PASS, "", "")]
    if rules.restrict:
        beyond = [
            ("beyond", _HALF, _FRAGMENT, "", ""),
            ("", _ANY_BIT, 0x3FFF, "drop", ""),
            ("", _X_IS_HEADER, 14, "", ""),
            ("", _BYTE, _PROTOCOL, "", ""),
            ("", _EQUAL, _TCP, "segment", "drop"),
        ]
    names = "segment" if rules.restrict else "name by tcp"
    return [
        ("ipv4", _BYTE, _TO, "", ""),
        ("", _EQUAL, 127, "drop", ""),
        ("", _EQUAL, 0, "drop", ""),
        ("", _WORD, _TO, "", ""),
        ("", _EQUAL, 0xFFFFFFFF, "everybody", ""),
        ("", _AND, 0xFFFFFF00, "", ""),
        ("", _EQUAL, _NETWORK, "", "beyond"),
        ("", _HALF, _FRAGMENT, "", ""),
        ("", _ANY_BIT, 0x3FFF, "drop", ""),
        ("", _X_IS_HEADER, 14, "", ""),
        ("", _BYTE, _PROTOCOL, "", ""),
        ("", _EQUAL, _ICMP, "pass", ""),
        ("", _EQUAL, _TCP, "tcp", ""),
        ("", _EQUAL, _UDP, "", "drop"),
        ("", _WORD, _TO, "", ""),
        ("", _EQUAL, _GATEWAY, "gateway", ""),
        ("", _EQUAL, _NAMES, "drop" if rules.restrict else "name", "drop"),
        ("gateway", _HALF_AT_X, _TO_PORT, "", ""),
        ("", _EQUAL, 67, "pass", ""),
        ("", _AT_LEAST, rules.clients_from, "answer", "drop"),
        ("tcp", _WORD, _TO, "", ""),
        ("", _EQUAL, _NAMES, names, "segment"),
        ("name by tcp", _HALF_AT_X, _TO_PORT, "", ""),
        ("", _EQUAL, 53, "pass", "segment"),
        ("name", _HALF_AT_X, _TO_PORT, "", ""),
        ("", _EQUAL, 53, "pass", "drop"),
        *beyond,
        ("segment", _BYTE_AT_X, _FLAGS, "", ""),
        ("", _AND, _SYN | _ACK, "", ""),
        ("", _EQUAL, _SYN, "drop", "pass"),
        ("everybody", _BYTE, _PROTOCOL, "", ""),
        ("", _EQUAL, _UDP, "", "drop"),
        ("", _HALF, _FRAGMENT, "", ""),
        ("", _ANY_BIT, 0x3FFF, "drop", ""),
        ("", _X_IS_HEADER, 14, "", ""),
        ("", _HALF_AT_X, _TO_PORT, "", ""),
        ("", _EQUAL, 67, "pass", "drop"),
    ]


def _of_ipv6() -> list[Step]:
    """In ::/64 are the unspecified address, loopback, and IPv4 addresses written as IPv6 ones (::ffff:127.0.0.1).

    Slirp's prefix is fd00::/64; what isn't its name server there stands for the loopback, and so does ff02::1. Slirp
    reads no header between IPv6 and TCP, UDP or ICMP.
    """
    return [
        ("ipv6", _WORD, _TO6, "", ""),
        ("", _EQUAL, 0, "lowest", ""),
        ("", _EQUAL, 0xFD000000, "local", ""),
        ("", _AND, 0xFFC00000, "", ""),
        ("", _EQUAL, 0xFE800000, "link", ""),
        ("", _AND, 0xFF000000, "", ""),
        ("", _EQUAL, 0xFF000000, "group", "pass"),
        ("lowest", _WORD, _TO6 + 4, "", ""),
        ("", _EQUAL, 0, "drop", "pass"),
        ("link", _BYTE, _NEXT_HEADER, "", ""),
        ("", _EQUAL, _ICMP6, "pass", "drop"),
        ("local", _WORD, _TO6 + 4, "", ""),
        ("", _EQUAL, 0, "", "pass"),
        ("", _BYTE, _NEXT_HEADER, "", ""),
        ("", _EQUAL, _ICMP6, "pass", ""),
        ("", _EQUAL, _TCP, "name6", ""),
        ("", _EQUAL, _UDP, "name6", "drop"),
        ("name6", _HALF, _TO_PORT6, "", ""),
        ("", _EQUAL, 53, "", "drop"),
        ("", _WORD, _TO6 + 8, "", ""),
        ("", _EQUAL, 0, "", "drop"),
        ("", _WORD, _TO6 + 12, "", ""),
        ("", _EQUAL, 3, "pass", "drop"),
        # Of UDP to many there is DHCP alone, to ff02::1:2.
        ("group", _BYTE, _NEXT_HEADER, "", ""),
        ("", _EQUAL, _ICMP6, "pass", ""),
        ("", _EQUAL, _UDP, "", "drop"),
        ("", _HALF, _TO_PORT6, "", ""),
        ("", _EQUAL, 547, "", "drop"),
        ("", _WORD, _TO6, "", ""),
        ("", _EQUAL, 0xFF020000, "", "drop"),
        ("", _WORD, _TO6 + 12, "", ""),
        ("", _EQUAL, 0x00010002, "pass", "drop"),
    ]


def calls(mac: str, address: str) -> list[Step]:
    """A filter for the end of a machine that sleeps: what is for its card alone, and who asks all for its address.

    Who knows where it is asks it alone now and then whether it still is: that is no call.
    """
    hardware = bytes.fromhex(mac.replace(":", ""))
    return [
        ("", _HALF, _KIND, "", ""),
        ("", _EQUAL, 0x0806, "asks", ""),
        ("", _WORD, 0, "", ""),
        ("", _EQUAL, int.from_bytes(hardware[:4], "big"), "", "drop"),
        ("", _HALF, 4, "", ""),
        ("", _EQUAL, int.from_bytes(hardware[4:], "big"), "pass", "drop"),
        ("asks", _WORD, 0, "", ""),
        ("", _EQUAL, 0xFFFFFFFF, "", "drop"),
        ("", _WORD, _ASKED_FOR, "", ""),
        ("", _EQUAL, int.from_bytes(socket.inet_aton(address), "big"), "pass", "drop"),
        ("pass", _RETURN, _PASS, "", ""),
        ("drop", _RETURN, 0, "", ""),
    ]


def is_call(frame: bytes, mac: str, address: str) -> bool:
    """Whether that filter lets a frame pass."""
    if frame[_KIND : _KIND + 2] == b"\x08\x06":
        return frame[:4] == b"\xff" * 4 and frame[_ASKED_FOR : _ASKED_FOR + 4] == socket.inet_aton(address)
    return frame[:6] == bytes.fromhex(mac.replace(":", ""))


def program(rules: Rules) -> bytes:
    """The filter as the kernel takes it."""
    return assembled(steps(rules))


def assembled(listing: Sequence[Step]) -> bytes:
    """Any filter as the kernel takes it."""
    places = {label: index for index, (label, *_) in enumerate(listing) if label}

    def distance(index: int, label: str) -> int:
        return int(label) if label.startswith("+") else places[label] - index - 1 if label else 0

    return b"".join(
        struct.pack("HBBI", operation, distance(index, then), distance(index, otherwise), number)
        for index, (_, operation, number, then, otherwise) in enumerate(listing)
    )


def attach(receiver: socket.socket, rules: Rules) -> None:
    """Let `receiver` get only the frames that may pass, in place of what it had before. Raises `OSError`."""
    import ctypes

    code = program(rules)
    buffer = ctypes.create_string_buffer(code, len(code))
    receiver.setsockopt(socket.SOL_SOCKET, ATTACH, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))


def guard(pid: int, *, restrict: bool, udp_ports: Sequence[int]) -> None:
    """Put the filter on the end of the link that the helper `pid` holds, or change it there.

    Raises `EngineFailed` when it can't be: then that network isn't to be used.
    """
    try:
        rules = Rules(restrict=restrict, answers_from=tuple(sorted(set(udp_ports))), clients_from=_first_client())
        with _end_of_link(pid) as end:
            attach(end, rules)
            # Its writes wait for a guest that is slow; yet it must go on hearing us while one stands still.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, _LONGEST_WAIT))
    except OSError as error:
        raise EngineFailed(
            "the network can't be made safe",
            f"this kernel doesn't let us filter what its helper reads: {error.strerror}",
            "Use `--network none`, and see `atoll doctor`.",
        ) from error


def _first_client() -> int:
    return int(_PORT_RANGE.read_text().split()[0])


def _end_of_link(pid: int) -> socket.socket:
    """Our copy of the only connected socket of that process that carries messages."""
    with descriptors.handle(pid) as process:
        # It is among the first that the helper opened. /proc doesn't tell them when the helper has a user of its own.
        for copy in descriptors.copies(process, most=FIRST_DESCRIPTORS):
            if carries_messages(copy):
                return socket.socket(fileno=os.dup(copy))
    raise EngineFailed("the network can't be made safe", "its helper has no link to us")


def carries_messages(descriptor: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as end:
        return end.type == socket.SOCK_SEQPACKET
