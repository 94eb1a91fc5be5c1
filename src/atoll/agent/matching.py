"""ETags, and changes that insist on one (`If-Match`, RFC 9110).

A tag is the version of the record, `-`, and a digest of the whole answer. `If-None-Match` asks about all of it, since
a phase changes without its record; `If-Match` only about the record, since a VM that was started meanwhile still has
the settings that the client knows.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from atoll.errors import InvalidInput
from atoll.model.version import version_of
from atoll.operations import expectation, networks
from atoll.operations.network_groups import find_group
from atoll.operations.services import Services
from atoll.platform.routes import Call

MATCHED = ("AsyncVm", "AsyncNetworks", "AsyncGroups")
"""What has versions that can be insisted on."""
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


def tag_of(thing: Any, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    # Nobody insists on a list, and it may be long.
    version = version_of(thing) if isinstance(thing, Struct) else digest[16:32]
    return f'"{version}-{digest[:16]}"'


def can_match(call: Call) -> bool:
    """Whether it is about one thing that has a version."""
    return call.changes and call.target in MATCHED and "{" in call.path


@contextlib.contextmanager
def insisting(
    header: str | None, call: Call, *, services: Services, vm: str | None, values: Mapping[str, Any]
) -> Iterator[None]:
    """What is done within is done only if the thing is still what the header says. Raises `Changed`."""
    if header is None:
        yield
        return
    if not can_match(call):
        raise InvalidInput(
            "If-Match can't be used here", f"{call.name} isn't about one thing that has an ETag", "Leave it away."
        )
    if header.strip() == "*":
        yield
        return
    versions = {tag.partition("-")[0] for tag in _TAG.findall(header)}
    with _expecting(call, versions, services=services, vm=vm, values=values):
        yield


def _expecting(
    call: Call, versions: set[str], *, services: Services, vm: str | None, values: Mapping[str, Any]
) -> contextlib.AbstractContextManager[None]:
    if call.target == "AsyncVm":
        vm_id = services.find_vm(vm or "").id
        return expectation.expecting(vm_id, versions, lambda: version_of(services.vm(vm_id)))
    if call.target == "AsyncGroups":
        name = values["name"]
        return expectation.expecting(f"group-{name}", versions, lambda: version_of(find_group(services, name)))
    network = networks.find_network(services, values["reference"])
    return expectation.expecting(network.id, versions, lambda: version_of(networks.network_of(services, network.id)))
