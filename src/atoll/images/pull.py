"""An image from its publisher: `atoll image pull NAME|URL`.

What proves that the right bytes came: the publisher's checksum file for a name in the catalogue, `--checksum` for an
address, or else TLS alone. An address without TLS and without a checksum is refused: anybody on the way could put
another system in its place.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote

import msgspec

from atoll.errors import InvalidInput
from atoll.images import catalogue, checksums
from atoll.images.addresses import public
from atoll.images.checksums import Checksum
from atoll.images.download import downloaded
from atoll.images.importer import host_arch, import_file, name_from
from atoll.images.made import Made, Report
from atoll.images.source import opened
from atoll.images.unpack import is_xz, unxz
from atoll.layout import Layout
from atoll.model.names import check_image_name
from atoll.model.requests import ImportRequest, PullRequest
from atoll.model.spec import GuestSpec
from atoll.model.units import MIB

CHECKSUM_FILE_LIMIT = 16 * MIB
"""Bytes. Debian's list of all cloud images has a tenth of it."""


async def pull(request: PullRequest, *, layout: Layout, folder: Path, report: Report) -> Made:
    """Download, verify and convert a published image into `folder`; downloads resume from `layout.downloads`.

    Raises `NotFound` for a name that isn't in the catalogue, `InvalidInput` for an address that can't be trusted,
    `DownloadFailed`, `ImageRefused`, and `StorageFailed` when the disk is full.
    """
    given = checksums.parse(request.checksum) if request.checksum else None
    if request.name:
        check_image_name(request.name)
    if "://" in request.source:
        return await _pull_url(request, given, layout=layout, folder=folder, report=report)
    return await _pull_named(request, given, layout=layout, folder=folder, report=report)


async def _pull_url(
    request: PullRequest, given: Checksum | None, *, layout: Layout, folder: Path, report: Report
) -> Made:
    address = public(request.source)
    if given is None and not request.source.lower().startswith("https://"):
        raise InvalidInput(
            f"{address} can't be trusted",
            "it has neither TLS nor a checksum",
            "Give --checksum sha256:…, or an https:// address.",
        )
    name = request.name or name_from(unquote(address.rstrip("/").rsplit("/", 1)[-1]))
    wanted = ImportRequest(path="", name=name, arch=request.arch)
    made = await _fetch(request.source, given, wanted, layout=layout, folder=folder, report=report)
    # A disk from the network is a cloud image as a rule; a seed that nothing reads does no harm.
    seed = GuestSpec(seed="nocloud") if made.layers else GuestSpec()
    return _with(made, source=address, guest=seed)


async def _pull_named(
    request: PullRequest, given: Checksum | None, *, layout: Layout, folder: Path, report: Report
) -> Made:
    arch = request.arch or host_arch()
    entry = catalogue.find(request.source, arch=arch, additions=layout.catalogue)
    if given is None:
        async with downloaded(
            entry.checksums, into=layout.downloads, checksum=None, report=report, limit=CHECKSUM_FILE_LIMIT
        ) as listing:
            text = listing.read_text(errors="replace")
        given = checksums.find_in(text, entry.file_name, origin=public(entry.checksums))
    name = request.name or (entry.name if arch == host_arch() else f"{entry.name}-{arch}")
    wanted = ImportRequest(path="", name=name, arch=arch, description=entry.description)
    made = await _fetch(entry.url, given, wanted, layout=layout, folder=folder, report=report)
    guest = GuestSpec(agent=entry.agent, seed="nocloud")
    made = _with(made, source=public(entry.url), guest=guest)
    image = msgspec.structs.replace(made.image, firmware=entry.firmwares[0], firmwares=entry.firmwares)
    return Made(image, layers=made.layers, blobs=made.blobs)


async def _fetch(
    url: str, checksum: Checksum | None, wanted: ImportRequest, *, layout: Layout, folder: Path, report: Report
) -> Made:
    async with (
        downloaded(url, into=layout.downloads, checksum=checksum, report=report) as archive,
        _unpacked(archive, folder=folder, report=report) as path,
    ):
        return await import_file(msgspec.structs.replace(wanted, path=str(path)), folder=folder, report=report)


@contextlib.asynccontextmanager
async def _unpacked(path: Path, *, folder: Path, report: Report) -> AsyncIterator[Path]:
    """The file itself, or what is in it if it is compressed with xz."""
    unpacked = folder / "unpacked"
    try:
        with opened(path) as source:
            if is_xz(source):
                await unxz(source, target=unpacked, report=report)
                path = unpacked
        yield path
    finally:
        unpacked.unlink(missing_ok=True)


def _with(made: Made, *, source: str, guest: GuestSpec) -> Made:
    image = msgspec.structs.replace(made.image, source=source, guest=guest)
    return Made(image, layers=made.layers, blobs=made.blobs)
