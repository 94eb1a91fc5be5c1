"""Memory that several machines begin with: each maps the file privately and copies only the pages that it writes.

The file of a snapshot's memory serves as it is, since every page of RAM has its own place in it; beside it lies a copy
of the stream without RAM, a few hundred kB, which is all that each machine has to load. Both are in a file system in
memory when there is room: a machine can be snapshotted while it runs only if its RAM is anonymous or from there
(userfaultfd(2)). Templates are made again when they aren't there, so they can be dropped, but for memory that is
nowhere else (`volatile`): who runs keeps what it has mapped.
"""

import asyncio
import os
import shutil
from pathlib import Path

from atoll.errors import StorageFailed, from_os_error
from atoll.host import disks, facts, files
from atoll.layout import Layout
from atoll.model.names import new_id
from atoll.model.snapshot import Memory
from atoll.operations.boot import Incoming
from atoll.operations.collect import needed_templates
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.services import Services
from atoll.qemu import mapped_ram
from atoll.qemu.plan import PrivateRam

DEVICES = ".devices"
RESERVE = 0.25
"""The part of the file system in memory that templates leave free."""
SCARCE = 0.1
"""The part of the computer's memory below which templates go."""


def memory_path(layout: Layout, memory: Memory) -> Path:
    """Where a snapshot's memory is."""
    return layout.templates / memory.id if memory.volatile else layout.memory_file(memory.id)


def folder(layout: Layout, size: int) -> Path | None:
    """The folder for templates, if it is ours alone and has room for `size` bytes more."""
    where = layout.templates
    try:
        files.make_folder(where)
        status, room = where.lstat(), shutil.disk_usage(where)
    except OSError:
        return None
    # Everybody may write in the folder above: somebody else's folder of that name isn't used.
    if status.st_uid != os.geteuid() or where.is_symlink() or status.st_mode & 0o077:
        return None
    return where if room.free - size > room.total * RESERVE else None


async def shared_memory(services: Services, memory: Memory) -> Incoming:
    """The memory for one more machine, copy-on-write; to be loaded whole where QEMU (before 9.0) saved a plain stream.

    Raises `StorageFailed`, `EngineFailed` for a damaged file.
    """
    path = memory_path(services.layout, memory)
    try:
        if not await asyncio.to_thread(mapped_ram.is_mapped, path):
            return Incoming(path)
        if not memory.volatile:
            path = await _in_memory(services, memory, path)
        devices = path.with_name(path.name + DEVICES)
        if not devices.exists():
            async with services.lease(IMAGES_LOCK, what="the images"):
                await asyncio.to_thread(_make_devices, path, devices)
        return Incoming(stream=devices, ram=PrivateRam(path=str(path), offset=_offset(path)))
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error


async def _in_memory(services: Services, memory: Memory, path: Path) -> Path:
    """A copy of the file in memory; the file itself when there is no room for one."""
    copy = services.layout.templates / memory.id
    if copy.exists():
        return copy
    async with services.lease(IMAGES_LOCK, what="the images"):
        where = folder(services.layout, memory.file_size)
        if where is None:
            drop(services)
            where = folder(services.layout, memory.file_size)
        if where is None:
            return path
        if not copy.exists():
            temporary = where / f".{new_id()}"
            try:
                await disks.copy_sparse(path, temporary)
                temporary.chmod(0o444)
                temporary.replace(copy)
            except StorageFailed:
                # Others took the room meanwhile.
                return path
            finally:
                temporary.unlink(missing_ok=True)
    return copy


def drop(services: Services) -> None:
    """Remove the templates that nobody is about to need. What runs keeps its memory."""
    needed = needed_templates(services)
    for path in services.layout.templates.glob("*") if services.layout.templates.is_dir() else ():
        if path.stem not in needed:
            path.unlink(missing_ok=True)


def drop_under_pressure(services: Services) -> None:
    """Let a machine that starts have the room of templates that nobody is about to need, when memory is scarce."""
    memory = facts.memory()
    if memory.available < memory.total * SCARCE:
        drop(services)


def _offset(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mapped_ram.ram_of(mapped_ram.blocks(descriptor)).pages_offset
    finally:
        os.close(descriptor)


def _make_devices(path: Path, devices: Path) -> None:
    if devices.exists():
        return
    temporary = devices.with_name(f".{new_id()}")
    try:
        mapped_ram.without_ram(path, temporary)
        files.freeze(temporary, devices)
    finally:
        temporary.unlink(missing_ok=True)
