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


def ipv4(to: str, protocol: int, payload: bytes, *, options: bytes = b"", fragment: int = 0) -> bytes:
    length = 20 + len(options)
    addresses = socket.inet_aton(GUEST) + socket.inet_aton(to)
    start = struct.pack(">BBHHHBB", 0x40 | length // 4, 0, length + len(payload), 1, fragment, 64, protocol)
    header = start + struct.pack(">H", checksum(start + bytes(2) + addresses + options)) + addresses + options
    return ethernet(header + payload, IPV4)


def segment(to: str, port: int, *, flags: int = SYN, options: bytes = b"", fragment: int = 0) -> bytes:
    """Of TCP; the first of a connection unless other flags are given."""
    pseudo = socket.inet_aton(GUEST) + socket.inet_aton(to) + struct.pack(">BBH", 0, TCP, 20)
    return ipv4(to, TCP, _segment(pseudo, port, flags), options=options, fragment=fragment)


def ipv6(to: str, protocol: int, payload: bytes) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, GUEST6) + socket.inet_pton(socket.AF_INET6, to)
    return ethernet(struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64) + addresses + payload, IPV6)


def segment6(to: str, port: int) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, GUEST6) + socket.inet_pton(socket.AF_INET6, to)
    return ipv6(to, TCP, _segment(addresses + struct.pack(">II", 20, TCP), port, SYN))


_source = 4000


def _segment(pseudo_header: bytes, port: int, flags: int) -> bytes:
    global _source
    _source += 1
    content = struct.pack(">HHIIBBHHH", _source, port, 1000, 0, 0x50, flags, 65535, 0, 0)
    return content[:16] + struct.pack(">H", checksum(pseudo_header + content)) + content[18:]


def datagram(to: str, port: int, content: bytes = b"?", *, source: int = 4000, fragment: int = 0) -> bytes:
    # Without a checksum, which UDP over IPv4 allows.
    udp = struct.pack(">HHHH", source, port, 8 + len(content), 0) + content
    return ipv4(to, UDP, udp, fragment=fragment)


def datagram6(to: str, port: int, content: bytes = b"?") -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, GUEST6) + socket.inet_pton(socket.AF_INET6, to)
    udp = struct.pack(">HHHH", 4000, port, 8 + len(content), 0) + content
    sum = checksum(addresses + struct.pack(">II", len(udp), UDP) + udp)
    return ipv6(to, UDP, udp[:6] + struct.pack(">H", sum) + udp[8:])


def tcp_flags(frame: bytes) -> int:
    """0 for what isn't TCP over IPv4."""
    if len(frame) < 54 or frame[12:14] != struct.pack(">H", IPV4) or frame[23] != TCP:
        return 0
    return frame[14 + (frame[14] & 15) * 4 + 13]


def between(source: str, destination: str, kind: int, payload: bytes) -> bytes:
    """From one hardware address to another, as text."""
    macs = bytes.fromhex(destination.replace(":", "")) + bytes.fromhex(source.replace(":", ""))
    return macs + struct.pack(">H", kind) + payload


def router_advert(mac: str, link_local: str, *, prefix: str) -> bytes:
    """To all nodes: be my client, and make an address of this prefix."""
    option = struct.pack(">BBBBIII", 3, 4, 64, 0xC0, 86400, 86400, 0) + socket.inet_pton(socket.AF_INET6, prefix)
    body = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + option
    everybody = "ff02::1"
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, each) for each in (link_local, everybody))
    total = checksum(addresses + struct.pack(">II", len(body), 58) + body)
    body = body[:2] + struct.pack(">H", total) + body[4:]
    header = struct.pack(">IHBB", 6 << 28, len(body), 58, 255) + addresses
    return between(mac, "33:33:00:00:00:01", IPV6, header + body)
