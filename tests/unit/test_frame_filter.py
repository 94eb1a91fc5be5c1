"""The filter of frames, run by the kernel on a real socket."""

import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.helpers import frames

from atoll.host import frame_filter

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A link with the filter on its second end."""
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sender, receiver:
        frame_filter.attach(receiver)
        receiver.setblocking(False)
        yield sender, receiver


def passes(pair: Pair, frame: bytes) -> bool:
    pair[0].send(frame)
    try:
        assert pair[1].recv(1 << 16) == frame
    except BlockingIOError:
        return False
    return True


def expected(frame: bytes) -> bool:
    """The rules, in other words."""
    if frame[12:14] == b"\x08\x06":
        return True
    if frame[12:14] == b"\x08\x00" and len(frame) >= 34:
        to = frame[30:34]
        return to[0] not in (0, 127) and (to != b"\xff" * 4 or frame[23] == frames.UDP)
    if frame[12:14] == b"\x86\xdd" and len(frame) >= 46:
        return frame[38:46] != bytes(8)
    # One whose address is cut, but can't be a forbidden one any more, is for slirp to refuse.
    return frame[12:14] == b"\x86\xdd" and len(frame) >= 42 and frame[38:42] != bytes(4)


ADDRESSES = st.one_of(
    st.sampled_from(["127.0.0.1", "127.255.0.9", "0.0.0.0", "0.1.2.3", "255.255.255.255", "10.0.2.2", "128.0.0.1"]),
    st.ip_addresses(v=4).map(str),
)
ADDRESSES6 = st.one_of(
    st.sampled_from(
        ["::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "fd00::2", "64:ff9b::1", "1::"]
    ),
    st.ip_addresses(v=6).map(str),
)
OPTIONS = st.sampled_from([b"", b"\x01" * 4, b"\x01" * 40])


@st.composite
def anything(draw: st.DrawFn) -> bytes:
    frame = draw(
        st.one_of(
            st.builds(frames.opening, ADDRESSES, st.integers(1, 65535), options=OPTIONS),
            st.builds(frames.datagram, ADDRESSES, st.integers(1, 65535), st.binary(max_size=20)),
            st.builds(frames.opening6, ADDRESSES6, st.integers(1, 65535)),
            st.builds(frames.ethernet, st.binary(max_size=60), st.integers(0, 65535)),
            st.binary(min_size=1, max_size=80),
        )
    )
    frame = frames.tagged(frame) if draw(st.booleans()) else frame
    return frame[: draw(st.integers(1, len(frame)))] if draw(st.booleans()) else frame


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frame=anything())
@example(frame=frames.hello())
def test_it_passes_what_the_rules_say(pair: Pair, frame: bytes) -> None:
    assert passes(pair, frame) == expected(frame)


@pytest.mark.parametrize(
    ("frame", "passed"),
    [
        (frames.hello(), True),
        (frames.opening("192.0.2.1", 80), True),
        (frames.opening("192.0.2.1", 80, options=b"\x01" * 8), True),
        (frames.opening("127.0.0.1", 80), False),
        (frames.opening("127.200.1.1", 80, options=b"\x01" * 8), False),
        (frames.datagram("127.0.0.53", 53, b"?"), False),
        (frames.opening("0.0.0.0", 80), False),
        (frames.datagram("255.255.255.255", 67, b"address, please"), True),
        (frames.opening("255.255.255.255", 80), False),
        (frames.tagged(frames.opening("192.0.2.1", 80)), False),
        (frames.opening6("fd00::2", 80), True),
        (frames.opening6("2001:db8::1", 80), True),
        (frames.opening6("::1", 80), False),
        (frames.opening6("::", 80), False),
        (frames.opening6("::ffff:127.0.0.1", 80), False),
        (frames.ethernet(bytes(60), 0x88F8), False),
    ],
)
def test_frames_that_matter(pair: Pair, frame: bytes, passed: bool) -> None:
    assert passes(pair, frame) == passed
    assert expected(frame) == passed


def test_it_can_t_be_taken_off_again(pair: Pair) -> None:
    detach = 27
    with pytest.raises(PermissionError):
        pair[1].setsockopt(socket.SOL_SOCKET, detach, 0)
    with pytest.raises(PermissionError):
        frame_filter.attach(pair[1])


def test_jumps_stay_inside() -> None:
    steps = list(struct.iter_unpack("HBBI", frame_filter.program()))
    for index, (operation, then, otherwise, _) in enumerate(steps):
        if operation == 0x15:
            assert max(index + 1 + then, index + 1 + otherwise) < len(steps)
    assert [operation for operation, *_ in steps[-2:]] == [6, 6]
