"""An image made from a file of the user's: `atoll image import`."""

import asyncio
import hashlib
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from atoll.errors import InvalidInput
from atoll.images import convert, plain
from atoll.images.formats import Inspection, inspect
from atoll.images.made import Made, Report
from atoll.images.source import SourceFile, digest, opened, shown
from atoll.model.image import Image, ImageDisk, Layer, SourceFormat
from atoll.model.names import check_image_name, new_id
from atoll.model.requests import ImportRequest
from atoll.model.spec import Arch, Firmware, GuestSpec

LONGEST_NAME = 63
SUFFIXES = re.compile(r"(\.(qcow2|raw|img|image|vmdk|vdi|vhdx?|vpc|iso|ima|xz|bin))+$")
_UNFIT_FOR_NAMES = re.compile(r"[^a-z0-9_.-]+")


@dataclass(frozen=True)
class _Content:
    """What one source file, or kernel with its initial RAM disk, became."""

    sha256: str
    disks: tuple[ImageDisk, ...] = ()
    kernel: str | None = None
    initrd: str | None = None
    layers: tuple[tuple[Path, Layer], ...] = ()
    blobs: tuple[tuple[Path, str], ...] = ()


async def import_file(request: ImportRequest, *, folder: Path, report: Report) -> Made:
    """Check a file, convert or copy it into `folder`, and say what image it makes.

    Raises `InvalidInput` for options that don't fit, `ImageRefused` for a file that is unknown, damaged or dangerous,
    or that changes meanwhile, `StorageFailed` when it can't be read or the disk is full. Whatever happens, all that
    was made is in `folder`.
    """
    path = Path(request.path)
    name = check_image_name(request.name or name_from(path.name))
    with opened(path, called=request.source) as source:
        found = inspect(source, request.format)
        arch = _arch(request, found)
        firmwares = _firmwares(found.format, arch)
        _check_options(request, found, firmwares)
        try:
            async with asyncio.timeout(convert.time_bound(source, found.virtual_size)):
                content = await _content(source, found, request=request, folder=folder, report=report)
        except TimeoutError as error:
            raise convert.too_slow(source, found) from error
        source.check_unchanged()
    image = Image(
        id=new_id(),
        name=name,
        arch=arch,
        created_at=time.time(),
        source=shown(request.source or path.absolute()),
        sha256=content.sha256,
        disks=content.disks,
        firmware=request.firmware or firmwares[0],
        firmwares=firmwares,
        kernel=content.kernel,
        initrd=content.initrd,
        cmdline=request.cmdline,
        guest=GuestSpec(agent=request.agent),
        description=request.description,
    )
    return Made(image, layers=content.layers, blobs=content.blobs)


def name_from(file_name: str) -> str:
    """A name for an image from the name of its file: `My Disk (1).QCOW2` → `my-disk-1`; `image` if nothing is left."""
    stem = SUFFIXES.sub("", file_name.lower())
    return _UNFIT_FOR_NAMES.sub("-", stem)[:LONGEST_NAME].strip("-_.") or "image"


def host_arch() -> Arch:
    """This computer's architecture, x86-64 when it is one that guests can't have."""
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return next((arch for arch in get_args(Arch) if arch == machine), "x86_64")


def _arch(request: ImportRequest, found: Inspection) -> Arch:
    if request.arch and found.arch and request.arch != found.arch:
        raise InvalidInput(f"that kernel is for {found.arch}, not {request.arch}", next_step="Leave --arch away.")
    # A floppy drive is something that only PCs have.
    return request.arch or found.arch or ("x86_64" if found.format == "floppy" else host_arch())


def _firmwares(kind: SourceFormat, arch: Arch) -> tuple[Firmware, ...]:
    """The ways in which such an image may boot, the usual one first."""
    if kind == "kernel":
        return ("kernel",)
    if arch != "x86_64":
        return ("uefi",)
    return ("bios",) if kind == "floppy" else ("bios", "uefi")


def _check_options(request: ImportRequest, found: Inspection, firmwares: tuple[Firmware, ...]) -> None:
    if request.firmware and request.firmware not in firmwares:
        raise InvalidInput(
            f"{request.firmware} can't boot it", f"it is {found.format}", f"Choose from: {', '.join(firmwares)}."
        )
    if found.format != "kernel" and (request.initrd or request.cmdline):
        raise InvalidInput("--initrd and --cmdline are for kernels", f"the file is {found.format}", "Leave them away.")


async def _content(
    source: SourceFile, found: Inspection, *, request: ImportRequest, folder: Path, report: Report
) -> _Content:
    match found.format:
        case "kernel":
            return await _kernel(source, initrd=request.initrd, folder=folder, report=report)
        case "iso" | "floppy":
            sha256 = await digest(source, report=report, step="copy", copy_to=folder / "disc")
            disk = _disc(found.format, size=source.size, blob=sha256)
            return _Content(sha256, disks=(disk,), blobs=((folder / "disc", sha256),))
        case _:
            sha256 = await digest(source, report=report)
            path, layer = await convert.to_layer(source, found, folder=folder, report=report)
            disk = ImageDisk(name="root", size=layer.virtual_size, layer=layer.id)
            return _Content(sha256, disks=(disk,), layers=((path, layer),))


def _disc(kind: SourceFormat, *, size: int, blob: str) -> ImageDisk:
    if kind == "iso":
        return ImageDisk(name="cdrom", size=size, blob=blob, bus="sata", media="cdrom")
    return ImageDisk(name="floppy", size=size, blob=blob, bus="floppy")


async def _kernel(source: SourceFile, *, initrd: str | None, folder: Path, report: Report) -> _Content:
    kernel = await digest(source, report=report, step="copy", copy_to=folder / "kernel")
    blobs = ((folder / "kernel", kernel),)
    if initrd is None:
        return _Content(kernel, kernel=kernel, blobs=blobs)
    with opened(Path(initrd)) as second:
        plain.kernel_size(second)
        ramdisk = await digest(second, report=report, step="copy", copy_to=folder / "initrd")
        second.check_unchanged()
    both = hashlib.sha256(f"{kernel} {ramdisk}".encode()).hexdigest()
    return _Content(both, kernel=kernel, initrd=ramdisk, blobs=(*blobs, (folder / "initrd", ramdisk)))
