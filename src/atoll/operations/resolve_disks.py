"""The disks of a VM, new ones and further ones, as `DiskSpec`s. Pure."""

import itertools
import re
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from atoll.errors import InvalidInput
from atoll.model.image import Image, ImageDisk
from atoll.model.names import new_id, shown
from atoll.model.requests import CreateRequest, DiskRequest
from atoll.model.spec import Arch, Bus, DiskSpec
from atoll.model.units import MIB, TIB, format_size, parse_size

LARGEST_DISK = 64 * TIB
_DISK_NAME = re.compile(r"[a-z][a-z0-9-]{0,19}", re.ASCII)


def all_disks(request: CreateRequest, image: Image | None, cdroms: Sequence[Image], arch: Arch) -> tuple[DiskSpec, ...]:
    """The disks of a new VM, but for those that come from further images. Raises `InvalidInput`."""
    disks = [_from_image(disk, request.disk_bus) for disk in (image.disks if image else ())]
    if request.disk_size is not None:
        disks = _grown(disks, check_disk_size(request.disk_size), request.disk_bus or "virtio")
    for further in request.disks:
        if further.image is None:
            disks.append(further_disk(further, disks))
    for cdrom in cdroms:
        media = next((disk for disk in cdrom.disks if disk.blob), None)
        if media is None:
            raise InvalidInput(
                f"the image {cdrom.name} isn't a CD", next_step="Import an ISO file: `atoll image import FILE.iso`."
            )
        bus: Bus = "sata" if arch == "x86_64" else "scsi"
        disks.append(
            DiskSpec(name=_free_name("cd", 0, disks), size=media.size, blob=media.blob, bus=bus, media="cdrom")
        )
    return tuple(disks)


def _from_image(disk: ImageDisk, bus: Bus | None) -> DiskSpec:
    chosen = bus if bus is not None and disk.layer is not None else disk.bus
    return DiskSpec(name=disk.name, size=disk.size, layer=disk.layer, blob=disk.blob, bus=chosen, media=disk.media)


def _grown(disks: list[DiskSpec], size: int, bus: Bus) -> list[DiskSpec]:
    """The first writable disk gets `size`; without one there is a new blank disk, before any CD."""
    for index, disk in enumerate(disks):
        if disk.blob is None:
            if size < disk.size:
                raise InvalidInput(
                    f"the disk can't have {format_size(size)}",
                    f"the image's has {format_size(disk.size)}, and disks only grow",
                )
            return [*disks[:index], replace(disk, size=size), *disks[index + 1 :]]
    return [DiskSpec(name="root", size=size, bus=bus), *disks]


def _free_name(stem: str, first: int, others: Sequence[DiskSpec]) -> str:
    """`data1`, `data2` …: the first that is free."""
    taken = {disk.name for disk in others}
    return next(f"{stem}{number}" for number in itertools.count(first) if f"{stem}{number}" not in taken)


def further_disk(request: DiskRequest, others: Sequence[DiskSpec], image: Image | None = None) -> DiskSpec:
    """A disk beside the ones that are there. Raises `InvalidInput`."""
    name = request.name or _free_name("data", 1, others)
    if not may_be_called(name):
        raise InvalidInput(
            f"{shown(name)} can't be the name of a disk",
            "it has up to 20 lower-case letters, digits and '-', and doesn't end like '-1'",
        )
    if any(disk.name == name for disk in others):
        raise InvalidInput(f"there is a disk '{name}' already", next_step="Choose another name.")
    if image is not None:
        source = next(iter(image.disks), None)
        if source is None:
            raise InvalidInput(f"the image {image.name} has no disk")
        size = source.size if request.size is None else max(source.size, check_disk_size(request.size))
        return DiskSpec(
            name=name,
            size=size,
            layer=source.layer,
            blob=source.blob,
            bus=request.bus or source.bus,
            media=source.media,
        )
    if request.size is None:
        raise InvalidInput(f"the disk '{name}' has no size", next_step="Give one, like size=10GiB.")
    return DiskSpec(name=name, size=check_disk_size(request.size), bus=request.bus or "virtio")


def may_be_called(name: str) -> bool:
    """Whether that can be the name of a disk."""
    return bool(_DISK_NAME.fullmatch(name)) and not re.search(r"-\d+$", name) and not name.endswith("-file")


def check_disk_size(size: str | int) -> int:
    """Bytes, a multiple of 512. Raises `InvalidInput`."""
    number = parse_size(size)
    if not MIB <= number <= LARGEST_DISK:
        raise InvalidInput(f"a disk of {format_size(number)} can't be", f"it has 1MiB to {format_size(LARGEST_DISK)}")
    return -(-number // 512) * 512


def with_heads(disks: Iterable[DiskSpec]) -> tuple[DiskSpec, ...]:
    """The disks, those that are written and have no head yet with a new one."""
    return tuple(disk if disk.blob or disk.head else replace(disk, head=new_id()) for disk in disks)


def without_heads(disks: Iterable[DiskSpec]) -> tuple[DiskSpec, ...]:
    return tuple(replace(disk, head="") for disk in disks)
