"""The version of a thing's record: it changes when somebody changes the thing, and not by what happens to it."""

import hashlib
from typing import Any

import msgspec
from msgspec.structs import replace

from atoll.model.groups import Group, GroupInfo
from atoll.model.network import NetworkInfo
from atoll.model.vm import Vm, VmInfo


def version_of(thing: Any) -> str:
    """Of a VM its settings, name, labels and place in the history: a start, an end, or a pause is no new version."""
    return hashlib.sha256(msgspec.json.encode(_record(thing))).hexdigest()[:16]


def _record(thing: Any) -> Any:
    if isinstance(thing, VmInfo):
        return _record(thing.vm)
    if isinstance(thing, Vm):
        return replace(thing, run=None, last_exit=None, seeded=False)
    if isinstance(thing, NetworkInfo):
        return thing.network
    if isinstance(thing, Group | GroupInfo):
        return (thing.name, thing.created_at, [str(rule) for rule in thing.rules])
    return thing
