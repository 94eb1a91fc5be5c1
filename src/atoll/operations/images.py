"""image build, image pull, image import: one verb with three makers; image tag, rm and prune.

    step     do                                                              undo
    make     the maker works in a folder of its own                          remove the folder
    adopt    freeze its files under their last names, record the image       (point of no return)
    clear    remove the folder

Layers and files that nothing needs are removed by `prune` under the lock that `adopt` and `create` hold.
"""

import asyncio
import shutil
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import NotFound, WrongState, from_os_error
from atoll.host import files
from atoll.host.orphans import end_orphans_of
from atoll.images.made import Made
from atoll.model.image import Image, Layer
from atoll.model.names import check_image_name
from atoll.model.requests import BuildRequest, ImportRequest, PullRequest
from atoll.model.spec import Arch
from atoll.operations.adopt import freeze
from atoll.operations.collect import collect
from atoll.operations.create import IMAGES_LOCK, find_image
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.prune import remove_images, unused_images, users_of_image
from atoll.operations.services import Report, Services


class MakeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image to be made; `folder` is the name of the maker's own folder under `tmp`."""

    kind: Literal["build", "pull", "import"]
    folder: str
    build: BuildRequest | None = None
    pull: PullRequest | None = None
    file: ImportRequest | None = None


async def make_image(
    request: BuildRequest | PullRequest | ImportRequest, *, services: Services, report: Report | None = None
) -> Image:
    """Make an image and record it. Raises what the maker raises: `BuildFailed`, `DownloadFailed`, `ImageRefused` …"""
    from atoll.model.names import new_id

    if request.name is not None:
        check_image_name(request.name)
    folder = f"image-{new_id()}"
    match request:
        case BuildRequest():
            wanted, what = MakeRequest(kind="build", folder=folder, build=request), request.name or request.recipe
        case PullRequest():
            wanted, what = MakeRequest(kind="pull", folder=folder, pull=request), request.name or request.source
        case ImportRequest():
            wanted, what = (
                MakeRequest(kind="import", folder=folder, file=request),
                request.name or Path(request.path).stem,
            )
    context = await perform(MAKE, wanted, services=services, subject=folder, subject_name=what, report=report)
    image = services.records.image(str(context.notes["image"]))
    if image is None:
        raise NotFound(f"the image '{what}' is gone", "another command removed it")
    return image


async def ensure(reference: str, *, arch: Arch | None, services: Services, report: Report | None = None) -> Image:
    """The image; one that isn't here yet is built or pulled by its name. Raises `NotFound` for unknown names."""
    try:
        return find_image(reference, services.records.images())
    except NotFound as unknown:
        from atoll.images import catalogue
        from atoll.images.recipes import RECIPES

        request: BuildRequest | PullRequest
        if reference in RECIPES:
            request = BuildRequest(recipe=reference, arch=arch)
        elif reference in {entry.name for entry in catalogue.entries(services.layout.catalogue)}:
            request = PullRequest(source=reference, arch=arch)
        else:
            raise NotFound(
                unknown.what, unknown.why, f"{unknown.next_step} `atoll image catalogue` lists more."
            ) from None
    return await make_image(request, services=services, report=report)


def _folder(context: Context[MakeRequest]) -> Path:
    return context.services.layout.temporary / context.request.folder


async def _make(context: Context[MakeRequest]) -> None:
    folder = _folder(context)
    await _remove_folder(context)
    files.make_folder(folder)
    try:
        made = await _maker(context, folder)
    except OSError as error:
        raise from_os_error(error, f"make the image {context.request.kind}") from error
    context.notes["made"] = _noted(made, folder)


async def _maker(context: Context[MakeRequest], folder: Path) -> Made:
    request, layout, report = context.request, context.services.layout, context.report
    if request.build is not None:
        from atoll.images.recipes import build

        return await build(request.build, layout=layout, folder=folder, report=report)
    if request.pull is not None:
        from atoll.images.pull import pull

        return await pull(request.pull, layout=layout, folder=folder, report=report)
    from atoll.images.importer import import_file

    assert request.file is not None
    return await import_file(request.file, folder=folder, report=report)


def _noted(made: Made, folder: Path) -> dict[str, Any]:
    """What the next step needs, also when it is another process that takes it."""
    return {
        "image": msgspec.to_builtins(made.image),
        "layers": [[str(path.relative_to(folder)), msgspec.to_builtins(layer)] for path, layer in made.layers],
        "blobs": [[str(path.relative_to(folder)), sha256] for path, sha256 in made.blobs],
    }


async def _remove_folder(context: Context[MakeRequest]) -> None:
    folder = _folder(context)
    if folder.exists():
        # What a killed command had begun goes on writing there.
        await asyncio.to_thread(end_orphans_of, folder)
        await asyncio.to_thread(shutil.rmtree, folder)


async def _adopt(context: Context[MakeRequest]) -> None:
    layout, records, folder = context.services.layout, context.services.records, _folder(context)
    noted = context.notes["made"]
    image = msgspec.convert(noted["image"], Image)
    image = replace(image, name=check_image_name(image.name), tags=tuple(check_image_name(tag) for tag in image.tags))
    layers = [(folder / name, msgspec.convert(layer, Layer)) for name, layer in noted["layers"]]
    for parent in (layout.layers, layout.blobs):
        files.make_folder(parent)
    async with context.services.lease(IMAGES_LOCK, what="the images"):
        for path, layer in layers:
            freeze(path, layout.layer(layer.id))
        for name, sha256 in noted["blobs"]:
            freeze(folder / name, layout.blob(sha256))
        records.add_image(image, [layer for _, layer in layers])
    context.notes["image"] = image.id
    records.add_event("image.added", name=image.name, data={"image": image.id, "source": image.source})


MAKE = Verb(
    name="image",
    request=MakeRequest,
    steps=(
        Step("make", _make, _remove_folder),
        Step("adopt", _adopt, final=True),
        Step("clear", _remove_folder),
    ),
)


# Names and removal: each one transaction, so there is nothing to undo


async def tag(reference: str, name: str, *, services: Services) -> Image:
    """Give an image one more name; it leaves the image that had it."""
    image = find_image(reference, services.records.images())
    names = dict.fromkeys([image.name, *image.tags, check_image_name(name)])
    return services.records.put_image_names(image.id, names)


async def remove(reference: str, *, services: Services, force: bool = False) -> None:
    """Take a name away; with the last one the image goes, unless VMs came from it (then only with `force`).

    VMs keep the layers that they need in any case.
    """
    async with services.lease(IMAGES_LOCK, what="the images"):
        image = find_image(reference, services.records.images())
        named = [name for name in (image.name, *image.tags) if name not in (reference, f"{reference}:latest")]
        by_id = len(named) == 1 + len(image.tags)
        if named and not by_id:
            services.records.put_image_names(image.id, named)
            return
        users = users_of_image(services, image)
        if users and not force:
            raise WrongState(
                f"the image {image.name} is in use",
                f"by {', '.join(users[:5])}",
                "Remove those first, or use --force: they keep their disks.",
            )
        services.records.remove_image(image.id)
        services.records.add_event("image.removed", name=image.name, data={"image": image.id})
        collect(services, dry_run=False)


async def prune(*, services: Services, every: bool = False, dry_run: bool = False) -> list[tuple[str, int]]:
    """Remove what nothing needs; with `every` also images that no VM came from. Returns names and bytes freed."""
    async with services.lease(IMAGES_LOCK, what="the images"):
        unused = unused_images(services) if every else []
        removed = remove_images(services, unused, dry_run=dry_run)
        return removed + collect(services, dry_run=dry_run, without={image.id for image in unused})
