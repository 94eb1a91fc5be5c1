"""Lists over HTTP: a page at a time, and only what fits.

The cursor is the time and the id of the last one that was told, so it still means a place when that one is gone.
"""

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any
from urllib.parse import urlencode

from litestar.params import Parameter
from msgspec import Struct

from atoll.errors import InvalidInput
from atoll.model.operation import OperationState
from atoll.model.state import Phase
from atoll.model.task import TaskState
from atoll.model.vm import Event

LONGEST = 1000
Limit = Annotated[int, Parameter(ge=1, le=LONGEST, description="how many at most; `Link` leads to the next ones")]
After = Annotated[str | None, Parameter(description="the cursor of a `Link`: what comes behind that place")]
Name = Annotated[
    str | None, Parameter(description="only those with this name; `*` and `?` stand for what they do in a shell")
]
Label = Annotated[
    list[str] | None, Parameter(description="only those with this label: `KEY`, or `KEY=VALUE`; several are all wanted")
]
STATE = Parameter(query="state", description="only those in this state; several are each welcome")
TaskStates = Annotated[list[TaskState] | None, STATE]


class List(Struct, frozen=True):
    """What a list can be asked for, beside `limit`, `after` and `name`."""

    place: Callable[[Any], tuple[float, str]]
    """When it was made, and its id."""
    name: Callable[[Any], str]
    state: Callable[[Any], str] | None = None
    states: Any = None
    """The type of that in the query."""
    labels: Callable[[Any], Mapping[str, str]] | None = None
    newest_first: bool = False


def _by_itself(thing: Any) -> tuple[float, str]:
    return thing.created_at, thing.id


LISTS: dict[str, List] = {
    "host.ls": List(
        place=lambda each: _by_itself(each.vm),
        name=lambda each: each.vm.name,
        state=lambda each: each.phase.value,
        states=Annotated[list[Phase] | None, STATE],
        labels=lambda each: each.vm.labels,
    ),
    "images.ls": List(place=_by_itself, name=lambda each: each.name),
    "operations.ls": List(
        place=_by_itself,
        name=lambda each: each.subject_name,
        state=lambda each: each.state,
        states=Annotated[list[OperationState] | None, STATE],
        newest_first=True,
    ),
    "tasks.ls": List(
        place=_by_itself,
        name=lambda each: each.subject,
        state=lambda each: each.state,
        states=TaskStates,
        newest_first=True,
    ),
}


def parameters(call: str) -> list[inspect.Parameter]:
    """The query of a list, for a handler's signature."""
    if (listed := LISTS.get(call)) is None:
        return []
    asked: dict[str, tuple[Any, Any]] = {"limit": (Limit, LONGEST), "after": (After, None), "name": (Name, None)}
    if listed.state is not None:
        asked["in_state"] = (listed.states, None)
    if listed.labels is not None:
        asked["label"] = (Label, None)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, kind, annotation=annotation, default=default)
        for name, (annotation, default) in asked.items()
    ]


def page(call: str, found: Sequence[Any], asked: Mapping[str, Any], path: str) -> tuple[list[Any], dict[str, str]]:
    """Those that were asked for, and the header that leads to the next ones."""
    listed = LISTS[call]
    fitting = [each for each in _behind(listed, found, asked["after"]) if _fits(listed, each, asked)]
    shown = fitting[: asked["limit"]]
    if len(shown) == len(fitting):
        return shown, {}
    created, identity = listed.place(shown[-1])
    return shown, link(path, {**asked, "after": f"{created!r}~{identity}"})


def link(path: str, query: Mapping[str, Any]) -> dict[str, str]:
    """The header that leads to the next page."""
    given = {
        name.removeprefix("in_"): [_text(each) for each in _listed(value)]
        for name, value in query.items()
        if value is not None
    }
    return {"Link": f'<{path}?{urlencode(given, doseq=True)}>; rel="next"'}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def is_event(event: Event, name: str | None, kinds: list[str] | None) -> bool:
    """Whether it is one that was asked for."""
    return (name is None or fnmatch.fnmatchcase(event.name, name)) and (not kinds or event.kind in kinds)


def _behind(listed: List, found: Sequence[Any], after: str | None) -> Sequence[Any]:
    if after is None:
        return found
    created, _, identity = after.partition("~")
    try:
        place = float(created), identity
    except ValueError as error:
        raise InvalidInput(
            "the cursor can't be used", f"{after[:80]!a} is no place in the list", "Take it from a `Link`."
        ) from error
    if listed.newest_first:
        return [each for each in found if _backwards(listed.place(each)) > _backwards(place)]
    return [each for each in found if listed.place(each) > place]


def _backwards(place: tuple[float, str]) -> tuple[float, str]:
    return -place[0], place[1]


def _fits(listed: List, thing: Any, asked: Mapping[str, Any]) -> bool:
    if (name := asked["name"]) is not None and not fnmatch.fnmatchcase(listed.name(thing), name):
        return False
    if listed.state is not None and asked["in_state"] and listed.state(thing) not in asked["in_state"]:
        return False
    if listed.labels is None or not asked["label"]:
        return True
    labels = listed.labels(thing)
    return all(_has(labels, wanted) for wanted in asked["label"])


def _has(labels: Mapping[str, str], wanted: str) -> bool:
    key, equals, value = wanted.partition("=")
    return key in labels and (not equals or labels[key] == value)
