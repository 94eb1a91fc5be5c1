"""Files handed to a QEMU that runs. It opens nothing by path: it gets descriptors in numbered sets."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll.errors import from_os_error
from atoll.model.launch import Access
from atoll.qemu.monitor import Monitor
from atoll.qemu.plan import HandOver

_FLAGS = {"read": os.O_RDONLY, "read-write": os.O_RDWR}


async def hand_over(monitor: Monitor, path: object, access: Access, *, name: str, number: int | None = None) -> int:
    """Open a file and give it to QEMU as a descriptor set; returns the set's number. Raises `StorageFailed`."""
    return await _hand_over(monitor, Path(str(path)), _FLAGS[access], name=name, number=number)


async def hand_over_new(monitor: Monitor, path: Path, *, name: str) -> int:
    """The same for a file that QEMU is to fill; it is made, or emptied."""
    return await _hand_over(monitor, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, name=name, number=None)


async def _hand_over(monitor: Monitor, path: Path, flags: int, *, name: str, number: int | None) -> int:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_os_error(error, f"open {path}") from error
    try:
        wanted = {} if number is None else {"fdset-id": number}
        added = await monitor.send_descriptor("add-fd", wanted | {"opaque": name}, descriptor)
    finally:
        os.close(descriptor)
    return int(added["fdset-id"])


async def add_nodes(monitor: Monitor, make: Callable[[HandOver], list[dict[str, Any]]]) -> None:
    """Add block nodes; `make` plans them, and is given what hands their files over."""
    files: list[tuple[str, object, Access]] = []
    highest = max((entry["fdset-id"] for entry in await monitor.execute("query-fdsets")), default=0)

    def number(name: str, path: object, access: Access) -> int:
        files.append((name, path, access))
        return int(highest) + len(files)

    nodes = make(number)
    for index, (name, path, access) in enumerate(files, start=1):
        await hand_over(monitor, path, access, name=name, number=int(highest) + index)
    for node in nodes:
        await monitor.execute("blockdev-add", node)


async def take_back(monitor: Monitor, *, name: str) -> None:
    """Close every set that was handed over under this name, also by a command that was killed."""
    for entry in await monitor.execute("query-fdsets"):
        if any(descriptor.get("opaque") == name for descriptor in entry["fds"]):
            await monitor.execute("remove-fd", {"fdset-id": entry["fdset-id"]})


def set_path(number: int) -> str:
    """The path that QEMU knows a descriptor set by."""
    return f"/dev/fdset/{number}"
