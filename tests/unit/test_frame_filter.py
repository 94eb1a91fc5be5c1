"""The filter of frames, run by the kernel on a real socket."""

import ipaddress
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import frames
from tests.helpers.frames import ACK, SYN, TCP, UDP

from atoll.host import frame_filter
from atoll.host.frame_filter import Rules

GATEWAY, NAMES, EVERYBODY = (ipaddress.IPv4Address(text) for text in ("10.0.2.2", "10.0.2.3", "255.255.255.255"))
LINK, PREFIX = ipaddress.IPv4Network("10.0.2.0/24"), ipaddress.IPv6Network("fd00::/64")
THIS_HOST = (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv4Network("0.0.0.0/8"), ipaddress.IPv6Network("::/64"))
RULES = {
    "open": Rules(),
    "open, with UDP published": Rules(answers_from=(53, 5353)),
    "restricted": Rules(restrict=True),
    "restricted, with UDP published": Rules(restrict=True, answers_from=(53,), clients_from=40000),
    "many": Rules(answers_from=tuple(range(1000, 1400))),
}

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(scope="module", params=RULES, autouse=True)
def rules(request: pytest.FixtureRequest) -> Rules:
    return RULES[request.param]


@pytest.fixture(scope="module")
def pair(rules: Rules) -> Iterator[Pair]:
    """A link with the filter on its second end."""
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sender, receiver:
        frame_filter.attach(receiver, rules)
        receiver.setblocking(False)
        yield sender, receiver


def passes(pair: Pair, frame: bytes) -> bool:
    pair[0].send(frame)
    try:
        assert pair[1].recv(1 << 16) == frame
    except BlockingIOError:
        return False
    return True


def expected(frame: bytes, rules: Rules) -> bool:
    """The rules, in other words, for whole frames."""
    kind = int.from_bytes(frame[12:14], "big")
    if kind == frames.IPV4:
        return _expected4(frame, rules)
    if kind == frames.IPV6:
        return not rules.restrict and _expected6(frame)
    return kind == frames.ARP


def _expected4(frame: bytes, rules: Rules) -> bool:
    to, protocol = ipaddress.IPv4Address(frame[30:34]), frame[23]
    whole = int.from_bytes(frame[20:22], "big") & 0x3FFF == 0
    body = frame[14 + (frame[14] & 15) * 4 :]
    source, port = struct.unpack(">HH", body[:4])
    if any(to in network for network in THIS_HOST[:2]):
        return False
    opens = protocol == TCP and body[13] & (SYN | ACK) == SYN
    if to == EVERYBODY:
        return whole and protocol == UDP and port == 67
    if to not in LINK:
        return not rules.restrict or (whole and protocol == TCP and not opens)
    if not whole:
        return False
    if to == NAMES and port == 53 and protocol in (TCP, UDP) and not rules.restrict:
        return True
    if protocol == UDP:
        answers = source in rules.answers_from and port >= rules.clients_from
        return to == GATEWAY and (port == 67 or answers)
    return protocol == 1 or (protocol == TCP and not opens)


def _expected6(frame: bytes) -> bool:
    to, protocol, port = ipaddress.IPv6Address(frame[38:54]), frame[20], int.from_bytes(frame[56:58], "big")
    if to in THIS_HOST[2]:
        return False
    if to.is_multicast:
        return protocol == 58 or (protocol == UDP and port == 547 and to == ipaddress.IPv6Address("ff02::1:2"))
    if to.is_link_local:
        return protocol == 58
    if to in PREFIX:
        return protocol == 58 or (protocol in (TCP, UDP) and port == 53 and to == PREFIX[3])
    return True


LOCAL = "10.0.2.2 10.0.2.2 10.0.2.3 10.0.2.3 10.0.2.4 10.0.2.15 10.0.2.255"
HOST = "127.0.0.1 127.255.0.9 0.0.0.0 0.1.2.3 255.255.255.255 128.0.0.1 192.0.2.1"
LOCAL6 = "fd00::2 fd00::3 fd00::3:3 fd00:0:0:1::3 fd01::3 fe80::2 feb0::1 fec0::1 ff02::1 ff02::1:2 ff05::1:2"
HOST6 = ":: ::1 ::ffff:127.0.0.1 ::ffff:a:1 ::127.0.0.1 0:0:1::1 64:ff9b::1 1:: 2001:db8::1 fe00::1"
ADDRESSES = st.one_of(st.sampled_from(f"{LOCAL} {HOST}".split()), st.ip_addresses(v=4).map(str))
ADDRESSES6 = st.one_of(st.sampled_from(f"{LOCAL6} {HOST6}".split()), st.ip_addresses(v=6).map(str))
PORTS = st.one_of(st.sampled_from([53, 67, 68, 69, 80, 547, 5353, 1399, 32767, 32768, 40000]), st.integers(1, 65535))
OPTIONS = st.sampled_from([b"", b"\x01" * 4, b"\x01" * 40])
FRAGMENTS = st.sampled_from([0, 0, 0, 0x4000, 0x2000, 0x2001, 5])
FLAGS = st.one_of(st.sampled_from([SYN, ACK, SYN | ACK, 0, SYN | 8]), st.integers(0, 255))
FRAMES = st.one_of(
    st.builds(frames.segment, ADDRESSES, PORTS, flags=FLAGS, options=OPTIONS, fragment=FRAGMENTS),
    st.builds(frames.datagram, ADDRESSES, PORTS, st.binary(max_size=20), source=PORTS, fragment=FRAGMENTS),
    st.builds(frames.ipv4, ADDRESSES, st.integers(0, 255), st.binary(min_size=20, max_size=40), options=OPTIONS),
    st.builds(frames.segment6, ADDRESSES6, PORTS),
    st.builds(frames.datagram6, ADDRESSES6, PORTS),
    st.builds(frames.ipv6, ADDRESSES6, st.integers(0, 255), st.binary(min_size=8, max_size=40)),
    st.builds(frames.ethernet, st.binary(min_size=60, max_size=60), st.integers(0, 65535)).filter(
        lambda frame: int.from_bytes(frame[12:14], "big") not in (frames.IPV4, frames.IPV6)
    ),
)


@settings(max_examples=400)
@given(frame=FRAMES, tagged=st.booleans())
def test_it_passes_what_the_rules_say(pair: Pair, rules: Rules, frame: bytes, tagged: bool) -> None:
    frame = frames.tagged(frame) if tagged else frame
    assert passes(pair, frame) == expected(frame, rules)


@given(frame=FRAMES, data=st.data())
def test_of_a_frame_that_is_dropped_no_beginning_passes_that_slirp_would_read(
    pair: Pair, rules: Rules, frame: bytes, data: st.DataObject
) -> None:
    """A header that is cut is for slirp to refuse; whatever has its whole header is judged by it."""
    if not expected(frame, rules):
        header = 14 + (40 if frame[12:14] == b"\x86\xdd" else (frame[14] & 15) * 4)
        assert not passes(pair, frame[: data.draw(st.integers(min(header, len(frame)), len(frame)))])


@settings(max_examples=50)
@given(frame=st.binary(min_size=1, max_size=100))
def test_it_bears_anything(pair: Pair, frame: bytes) -> None:
    passes(pair, frame)


FRAMES_THAT_MATTER = [
    (frames.hello(), True, True),
    (frames.segment("192.0.2.1", 80), True, False),
    (frames.segment("192.0.2.1", 80, options=b"\x01" * 8), True, False),
    (frames.segment("192.0.2.1", 80, flags=SYN | ACK), True, True),
    (frames.segment("192.0.2.1", 80, flags=ACK, fragment=0x2000), True, False),
    (frames.datagram("192.0.2.1", 53), True, False),
    (frames.segment("127.0.0.1", 80), False, False),
    (frames.segment("127.0.0.1", 80, flags=ACK), False, False),
    (frames.segment("127.200.1.1", 80, options=b"\x01" * 8), False, False),
    (frames.datagram("127.0.0.53", 53), False, False),
    (frames.segment("0.0.0.0", 80), False, False),
    (frames.segment("10.0.2.2", 80), False, False),
    (frames.segment("10.0.2.2", 80, options=b"\x01" * 4), False, False),
    (frames.segment("10.0.2.2", 40000, flags=SYN | ACK), True, True),
    (frames.segment("10.0.2.2", 40000, flags=ACK, options=b"\x01" * 4), True, True),
    (frames.segment("10.0.2.2", 40000, flags=ACK, fragment=0x2000), False, False),
    (frames.segment("10.0.2.3", 53), True, False),
    (frames.datagram("10.0.2.3", 53), True, False),
    (frames.datagram("10.0.2.3", 54), False, False),
    (frames.datagram("10.0.2.2", 67), True, True),
    (frames.datagram("10.0.2.2", 53), False, False),
    (frames.datagram("10.0.2.2", 50000), False, False),
    (frames.datagram("255.255.255.255", 67), True, True),
    (frames.datagram("255.255.255.255", 68), False, False),
    (frames.segment("255.255.255.255", 80), False, False),
    (frames.tagged(frames.segment("192.0.2.1", 80)), False, False),
    (frames.segment6("2001:db8::1", 80), True, False),
    (frames.segment6("fd00::2", 80), False, False),
    (frames.segment6("fd00::3", 53), True, False),
    (frames.segment6("::1", 80), False, False),
    (frames.segment6("::", 80), False, False),
    (frames.segment6("::ffff:127.0.0.1", 80), False, False),
    (frames.datagram6("ff02::1:2", 547), True, False),
    (frames.datagram6("ff02::1", 547), False, False),
    (frames.ethernet(bytes(60), 0x88F8), False, False),
]


def test_frames_that_matter(pair: Pair, rules: Rules) -> None:
    for frame, passed, restricted in FRAMES_THAT_MATTER:
        wanted = restricted if rules.restrict else passed
        assert (frame, passes(pair, frame)) == (frame, wanted)
        assert (frame, expected(frame, rules)) == (frame, wanted)


def test_answers_go_from_a_published_port_to_a_client(pair: Pair, rules: Rules) -> None:
    for port in rules.answers_from:
        assert passes(pair, frames.datagram("10.0.2.2", 50000, source=port))
        assert not passes(pair, frames.datagram("10.0.2.2", 111, source=port))
        assert not passes(pair, frames.datagram("10.0.2.2", 50000, source=port + 600))


def test_it_is_replaced(pair: Pair, rules: Rules) -> None:
    frame_filter.attach(pair[1], Rules(restrict=rules.restrict, answers_from=(7,)))
    assert passes(pair, frames.datagram("10.0.2.2", 50000, source=7))
    frame_filter.attach(pair[1], rules)
    assert not passes(pair, frames.datagram("10.0.2.2", 50000, source=7))


def test_no_jump_is_too_far(rules: Rules) -> None:
    steps = list(struct.iter_unpack("HBBI", frame_filter.program(rules)))
    for index, (operation, then, otherwise, _) in enumerate(steps):
        if operation & 7 == 5:
            assert max(index + 1 + then, index + 1 + otherwise) < len(steps)
