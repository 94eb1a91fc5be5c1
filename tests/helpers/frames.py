"""Ethernet frames made by hand, as a guest might send them that doesn't keep to any rule."""

import socket
import struct

GUEST_MAC, GATEWAY_MAC = bytes.fromhex("525400123456"), bytes.fromhex("52550a000202")
GUEST, GUEST6 = "10.0.2.15", "fd00::15"
IPV4, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
TCP, UDP, ICMP6 = 6, 17, 58
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


def untagged(frame: bytes) -> bytes:
    """As Linux hands it on."""
    return frame[:12] + frame[16:] if frame[12:14] == VLAN.to_bytes(2) else frame


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


# Between any two


def between(source: str, destination: str, kind: int, payload: bytes) -> bytes:
    """From one hardware address to another, as text."""
    return packed(destination) + packed(source) + struct.pack(">H", kind) + payload


def packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def arp_reply(mac: str, to_mac: str, *, claimed: str, claimed_mac: str, to: str) -> bytes:
    """`claimed` is at `claimed_mac`."""
    body = struct.pack(">HHBBH", 1, IPV4, 6, 4, 2) + packed(claimed_mac) + socket.inet_aton(claimed)
    return between(mac, to_mac, ARP, body + packed(to_mac) + socket.inet_aton(to))


def udp4(mac: str, to_mac: str, source: tuple[str, int], to: tuple[str, int], content: bytes = b"x") -> bytes:
    """Without a checksum, which is allowed."""
    body = struct.pack(">HHHH", source[1], to[1], 8 + len(content), 0) + content
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(to[0])
    start = struct.pack(">BBHHHBB", 0x45, 0, 20 + len(body), 1, 0, 64, UDP)
    header = start + struct.pack(">H", checksum(start + bytes(2) + addresses)) + addresses
    return between(mac, to_mac, IPV4, header + body)


def dhcp_ack(mac: str, to_mac: str, *, server: str, address: str) -> bytes:
    """An answer that nobody asked for: this is your address, and I am your router."""
    addresses = socket.inet_aton(address) + socket.inet_aton(server) + bytes(4)
    fixed = struct.pack(">BBBBIHH", 2, 1, 6, 0, 1, 0, 0x8000) + bytes(4) + addresses + packed(to_mac) + bytes(202)
    options = b"\x63\x82\x53\x63\x35\x01\x05\x03\x04" + socket.inet_aton(server) + b"\xff"
    return udp4(mac, to_mac, (server, 67), (address, 68), fixed + options)


def between6(mac: str, to_mac: str, addresses: tuple[str, str], protocol: int, body: bytes) -> bytes:
    """Of IPv6; the body's checksum, in its place at `body[at:at + 2]`, is made here."""
    both = b"".join(socket.inet_pton(socket.AF_INET6, each) for each in addresses)
    at = {ICMP6: 2, TCP: 16}.get(protocol, 6)
    total = checksum(both + struct.pack(">II", len(body), protocol) + body)
    body = body[:at] + struct.pack(">H", total) + body[at + 2 :]
    return between(mac, to_mac, IPV6, struct.pack(">IHBB", 6 << 28, len(body), protocol, 255) + both + body)


def router_advert(mac: str, link_local: str, *, prefix: str) -> bytes:
    """To all nodes: be my client, and make an address of this prefix."""
    option = struct.pack(">BBBBIII", 3, 4, 64, 0xC0, 86400, 86400, 0) + socket.inet_pton(socket.AF_INET6, prefix)
    body = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + option
    return between6(mac, "33:33:00:00:00:01", (link_local, "ff02::1"), ICMP6, body)


def neighbour_advert(mac: str, to_mac: str, source: str, to: str, *, claimed: str) -> bytes:
    """`claimed` is at `mac`: believe it instead of what you know."""
    body = struct.pack(">BBHI", 136, 0, 0, 0x60000000) + socket.inet_pton(socket.AF_INET6, claimed)
    return between6(mac, to_mac, (source, to), ICMP6, body + b"\x02\x01" + packed(mac))


def redirect(mac: str, to_mac: str, source: str, to: str, *, target: str, destination: str) -> bytes:
    """Reach `destination` by `target`."""
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, each) for each in (target, destination))
    return between6(mac, to_mac, (source, to), ICMP6, struct.pack(">BBHI", 137, 0, 0, 0) + addresses)


def udp6(mac: str, to_mac: str, source: tuple[str, int], to: tuple[str, int]) -> bytes:
    return between6(mac, to_mac, (source[0], to[0]), UDP, struct.pack(">HHHH", source[1], to[1], 9, 0) + b"x")
