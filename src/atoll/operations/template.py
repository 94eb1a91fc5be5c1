"""Memory that several machines begin with: each maps the file privately and copies only the pages that it writes.

The file of a snapshot's memory serves as it is, since every page of RAM has its own place in it. Beside it lies a copy
of the stream without RAM, a few hundred kB, which is all that each machine has to load. Both are in the page cache
while they are used, and the kernel drops them when memory is short; the copy is made again when it isn't there.
"""

import asyncio
import os
from pathlib import Path

from atoll.errors import from_os_error
from atoll.host import files
from atoll.model.names import new_id
from atoll.model.snapshot import Memory
from atoll.operations.boot import Incoming
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.services import Services
from atoll.qemu import mapped_ram
from atoll.qemu.plan import PrivateRam

DEVICES = ".devices"


async def shared_memory(services: Services, memory: Memory) -> Incoming:
    """The memory for one more machine, copy-on-write. Raises `StorageFailed`, `EngineFailed` for a damaged file."""
    path = services.layout.memory_file(memory.id)
    devices = path.with_name(path.name + DEVICES)
    try:
        if not devices.exists():
            async with services.lease(IMAGES_LOCK, what="the images"):
                await asyncio.to_thread(_make, services.layout.temporary, path, devices)
        return Incoming(stream=devices, ram=PrivateRam(path=str(path), offset=_offset(path)))
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error


def _offset(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mapped_ram.ram_of(mapped_ram.blocks(descriptor)).pages_offset
    finally:
        os.close(descriptor)


def _make(folder: Path, path: Path, devices: Path) -> None:
    if devices.exists():
        return
    temporary = files.make_folder(folder) / f"devices-{new_id()}"
    try:
        mapped_ram.without_ram(path, temporary)
        files.freeze(temporary, devices)
    finally:
        temporary.unlink(missing_ok=True)
