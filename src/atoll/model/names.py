"""Names and ids of VMs and images, and how a reference given by the user finds one."""

import difflib
import re
import uuid
from collections.abc import Iterable
from typing import Protocol, TypeVar

from atoll.errors import InvalidInput, NotFound

# A VM's name becomes its host name, so letters, digits, '.', '_' and '-' only; 63 is the longest label of a host name.
_VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
_IMAGE_NAME = re.compile(
    r"[a-z0-9][a-z0-9_.-]{0,62}(?:/[a-z0-9][a-z0-9_.-]{0,62})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,62})?", re.ASCII
)
SHORT_ID = 12
_LISTS = {"image": "image ls", "network": "net ls"}


class Named(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...


Thing = TypeVar("Thing", bound=Named)


def new_id() -> str:
    """32 hexadecimal digits: a random UUID without dashes."""
    return uuid.uuid4().hex


def shown(name: str) -> str:
    """What a user wrote, quoted for an error: without what could steer a terminal, and not endless."""
    return repr(name) if len(name) <= 80 else f"{name[:80]!r}… ({len(name)} characters)"


def check_vm_name(name: str) -> str:
    """The name itself, or `InvalidInput`."""
    if not _VM_NAME.fullmatch(name):
        raise InvalidInput(
            f"{shown(name)} can't be the name of a VM",
            "a name has up to 63 letters (a-z), digits, '.', '_' and '-', and starts with a letter or digit",
            "Choose another with --name.",
        )
    return name


def check_snapshot_name(name: str) -> str:
    """The name itself, or `InvalidInput`."""
    if not _VM_NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} can't be the name of a snapshot",
            "a name has up to 63 letters (a-z), digits, '.', '_' and '-', and starts with a letter or digit",
            "Say more with --message.",
        )
    return name


def check_image_name(name: str) -> str:
    """The name with its tag (`:latest` when none was given), or `InvalidInput`."""
    if not _IMAGE_NAME.fullmatch(name):
        raise InvalidInput(
            f"{shown(name)} can't be the name of an image",
            "a name is lower-case letters, digits, '.', '_', '-' and '/', and a tag after one ':'",
            "Write it like debian:13 or team/web:v2.",
        )
    return name if ":" in name else f"{name}:latest"


def find(reference: str, things: Iterable[Thing], kind: str) -> Thing:
    """The one thing whose name, id or unique id or name prefix is `reference`, an exact name first.

    Raises `NotFound` (with near names) or `InvalidInput` when a prefix fits several.
    """
    everything = list(things)
    exact = [thing for thing in everything if reference == thing.name]
    exact += [thing for thing in everything if reference == thing.id]
    if exact:
        return exact[0]
    fitting = [
        thing
        for thing in everything
        if reference and (thing.id.startswith(reference) or thing.name.startswith(reference))
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        some = ", ".join(sorted(thing.name for thing in fitting)[:5])
        raise InvalidInput(
            f"'{reference}' fits {len(fitting)} {kind}s", some, "Write the whole name, or more of the id."
        )
    near = difflib.get_close_matches(reference, [thing.name for thing in everything], n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"`atoll {_LISTS.get(kind, 'ls')}` lists what there is."
    raise NotFound(f"there is no {kind} '{reference}'", next_step=hint)
