"""Which layers are merged: chains stay short, and little is written for it."""

from hypothesis import given
from hypothesis import strategies as st

from atoll.model.chain import AFTER, LONGEST, window_to_merge
from atoll.model.image import Layer


def layers(sizes: list[int]) -> list[Layer]:
    return [Layer(id=f"l{number}", virtual_size=1, file_size=size) for number, size in enumerate(sizes)]


def test_a_short_chain_is_left_alone() -> None:
    assert window_to_merge(layers([1] * LONGEST), ()) is None


def test_a_large_image_at_the_bottom_is_not_copied() -> None:
    assert window_to_merge(layers([10**9, *[1] * LONGEST]), ()) is not None
    start, _ = window_to_merge(layers([10**9, *[1] * LONGEST]), ()) or (0, 0)
    assert start > 0


def test_layers_that_others_need_are_rather_left_where_they_are() -> None:
    needed = {"l5", "l6", "l7"}
    first, last = window_to_merge(layers([5] * 9), needed) or (0, 0)
    assert not needed & {f"l{number}" for number in range(first, last)}


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.sets(st.integers(0, 39)))
def test_what_is_left_is_as_short_as_it_has_to_be(sizes: list[int], needed: set[int]) -> None:
    chain = layers(sizes)
    window = window_to_merge(chain, {f"l{number}" for number in needed})
    if len(chain) <= LONGEST:
        assert window is None
        return
    assert window is not None
    first, last = window
    assert 0 <= first < last < len(chain)
    assert len(chain) - (last - first) == AFTER


@given(st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=20, max_size=200))
def test_bytes_written_stay_within_a_few_times_those_that_came(grown: list[tuple[int, bool]]) -> None:
    """Each snapshot adds a layer; merging goes on as it does in use."""
    chain = layers([10**6])
    written = 0
    for number, (size, _) in enumerate(grown):
        chain.append(Layer(id=f"s{number}", virtual_size=1, file_size=size))
        window = window_to_merge(chain, {"l0"})
        if window is not None:
            first, last = window
            merged = sum(layer.file_size for layer in chain[first : last + 1])
            written += merged
            chain[first : last + 1] = [Layer(id=f"m{number}", virtual_size=1, file_size=merged)]
        assert len(chain) <= LONGEST
    assert chain[0].id == "l0"
    came = sum(size for size, _ in grown)
    # Like the levels of a log-structured tree, but only a few of them.
    assert written <= came * (2 + len(grown) // 4)
