"""Ethernet frames made by hand, as a guest might send them that doesn't keep to any rule."""

import socket
import struct

GUEST_MAC, GATEWAY_MAC = bytes.fromhex("525400123456"), bytes.fromhex("52550a000202")
GUEST, GUEST6 = "10.0.2.15", "fd00::15"
IPV4, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
TCP, UDP = 6, 17
SYN, ACK = 2, 16


def checksum(content: bytes) -> int:
    content += bytes(len(content) % 2)
    total = sum(struct.unpack(f">{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(payload: bytes, kind: int, *, to: bytes = GATEWAY_MAC) -> bytes:
    return to + GUEST_MAC + struct.pack(">H", kind) + payload


def tagged(frame: bytes) -> bytes:
    """The same frame in a VLAN."""
    return frame[:12] + struct.pack(">HH", VLAN, 5) + frame[12:]


def hello() -> bytes:
    """What tells the gateway our address: a question for its own."""
    parts = GUEST_MAC + socket.inet_aton(GUEST) + bytes(6) + socket.inet_aton("10.0.2.2")
    return ethernet(struct.pack(">HHBBH", 1, IPV4, 6, 4, 1) + parts, ARP, to=b"\xff" * 6)


def ipv4(to: str, protocol: int, payload: bytes, *, options: bytes = b"") -> bytes:
    length = 20 + len(options)
    addresses = socket.inet_aton(GUEST) + socket.inet_aton(to)
    start = struct.pack(">BBHHHBB", 0x40 | length // 4, 0, length + len(payload), 1, 0, 64, protocol)
    header = start + struct.pack(">H", checksum(start + bytes(2) + addresses + options)) + addresses + options
    return ethernet(header + payload, IPV4)


def opening(to: str, port: int, *, options: bytes = b"") -> bytes:
    """The first segment of a TCP connection."""
    pseudo = socket.inet_aton(GUEST) + socket.inet_aton(to) + struct.pack(">BBH", 0, TCP, 20)
    return ipv4(to, TCP, _opening(pseudo, port), options=options)


def opening6(to: str, port: int) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, GUEST6) + socket.inet_pton(socket.AF_INET6, to)
    segment = _opening(addresses + struct.pack(">II", 20, TCP), port)
    return ethernet(struct.pack(">IHBB", 6 << 28, len(segment), TCP, 64) + addresses + segment, IPV6)


_source = 4000


def _opening(pseudo_header: bytes, port: int) -> bytes:
    global _source
    _source += 1
    segment = struct.pack(">HHIIBBHHH", _source, port, 1000, 0, 0x50, SYN, 65535, 0, 0)
    return segment[:16] + struct.pack(">H", checksum(pseudo_header + segment)) + segment[18:]


def datagram(to: str, port: int, content: bytes) -> bytes:
    # Without a checksum, which UDP allows.
    return ipv4(to, UDP, struct.pack(">HHHH", 4000, port, 8 + len(content), 0) + content)


def tcp_flags(frame: bytes) -> int:
    """0 for what isn't TCP over IPv4."""
    if len(frame) < 54 or frame[12:14] != struct.pack(">H", IPV4) or frame[23] != TCP:
        return 0
    return frame[14 + (frame[14] & 15) * 4 + 13]
