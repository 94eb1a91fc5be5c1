"""What a newer agent adds is left out, also where a type forbids unknown fields; what is wrong stays wrong."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.model.vm import Event
from atoll.platform import lenient, routes


class Inner(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    number: int
    name: str = ""


class Outer(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    one: Inner
    several: tuple[Inner, ...] = ()
    named: dict[str, Inner] = {}  # msgspec copies it
    perhaps: Inner | None = None
    pair: tuple[Inner, int] | None = None


inner = st.builds(Inner, number=st.integers(-9, 9), name=st.text(max_size=3))
outer = st.builds(
    Outer,
    one=inner,
    several=st.lists(inner, max_size=2).map(tuple),
    named=st.dictionaries(st.text(max_size=2), inner, max_size=2),
    perhaps=st.none() | inner,
    pair=st.none() | st.tuples(inner, st.integers(0, 3)),
)


def with_more(value: Any, kind: Any = None) -> Any:
    """The same with a field more in each object that is a Struct."""
    if isinstance(value, msgspec.Struct):
        return {name: with_more(getattr(value, name)) for name in value.__struct_fields__} | {"new in 2.0": [{}]}
    if isinstance(value, dict):
        return {key: with_more(item) for key, item in value.items()}
    return [with_more(item) for item in value] if isinstance(value, list | tuple) else value


@given(outer)
def test_unknown_fields_are_left_out_wherever_they_are(value: Outer) -> None:
    assert lenient.decode(msgspec.json.encode(with_more(value)), Outer) == value
    assert lenient.convert(with_more(value), Outer) == value


def test_an_event_with_a_new_field_is_read() -> None:
    event = Event(id=3, at=1.5, kind="vm.started", name="web", data={"left": {"as": "it is"}})
    assert lenient.decode(msgspec.json.encode(with_more(event) | {"data": event.data}), Event) == event


@pytest.mark.parametrize(
    "content", [b'{"one": {}}', b'{"one": {"number": "x"}, "more": 1}', b"[]", b"{", b'{"more": 1}']
)
def test_what_lacks_something_or_is_of_another_kind_is_refused(content: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        lenient.decode(content, Outer)


@pytest.mark.parametrize("call", routes.CALLS, ids=lambda call: call.name)
def test_each_result_of_the_api_can_be_looked_at(call: routes.Call) -> None:
    kind = routes.result(call)
    assert kind is type(None) or msgspec.inspect.type_info(kind) is not None
