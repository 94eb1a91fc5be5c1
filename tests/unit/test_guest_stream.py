"""What a command's output looks like between the ports and the sink."""

from hypothesis import given
from hypothesis import strategies as st

from atoll.operations.guest_stream import OutputStream

END = b"\x1eaa\x1fbb7\x1e"
MARK = b"\x1emm\x1e"


def stream() -> tuple[OutputStream, bytearray]:
    got = bytearray()
    return OutputStream(first="aa", second="bb", mark="mm", sink=got.extend), got


@given(
    st.lists(st.sampled_from([b"\x1e", b"\x1f", b"aa", b"bb", b"mm", MARK, b"x\0", b"\x1eaa\x1f"])), st.integers(1, 9)
)
def test_data_arrive_as_they_were_however_they_are_cut(parts: list[bytes], size: int) -> None:
    data = b"".join(parts)
    if b"\x1eaa\x1fbb" in data:
        return
    taker, got = stream()
    whole = data + END + b"late" + MARK
    for start in range(0, len(whole), size):
        taker.feed(whole[start : start + size])
    assert bytes(got) == data
    assert taker.code == 7
    assert taker.drained


def test_the_mark_is_data_before_the_end() -> None:
    taker, got = stream()
    taker.feed(b"a" + MARK + b"b")
    assert bytes(got) == b"a" + MARK + b"b"
    assert not taker.drained


def test_what_can_be_no_end_is_not_held_back() -> None:
    taker, got = stream()
    taker.feed(b"text\x1e!")
    assert bytes(got) == b"text\x1e!"


def test_a_beginning_of_the_end_is_held_back() -> None:
    taker, got = stream()
    taker.feed(b"text\x1eaa\x1fb")
    assert bytes(got) == b"text"
    taker.feed(b"b0\x1e")
    assert taker.code == 0
    assert bytes(got) == b"text"
