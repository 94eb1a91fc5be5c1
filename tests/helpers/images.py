"""Images are built once, cached by the content of what builds them; a test's home gets hard links to the files."""

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

import atoll
from atoll.host.files import locked, make_folder
from atoll.layout import Layout
from atoll.model.image import Image
from atoll.model.requests import BuildRequest, ImportRequest
from atoll.operations.create import find_image
from atoll.operations.images import make_image
from atoll.operations.services import Services

CACHE = Path(os.environ.get("ATOLL_TEST_CACHE") or Path.home() / ".cache/atoll-test")


def _key() -> str:
    """Changes when the code that builds images changes, or the schema of their records: checkouts share the cache."""
    digest = hashlib.sha256()
    folder = Path(atoll.__file__).parent
    for path in (folder / "store/schema.py", *sorted((folder / "images").rglob("*"))):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cached_layout() -> Layout:
    home = CACHE / f"images-{_key()}"
    # The packages stay when the code changes.
    return Layout(data=home / "data", cache=CACHE / "packages", run=home / "run")


async def built(recipe: str) -> tuple[Image, Layout]:
    """The image, from the cache or built now; `tiny@aarch64` is that for another architecture."""
    layout = cached_layout()
    make_folder(layout.data)
    name, _, arch = recipe.partition("@")

    def build() -> Image:
        with locked(layout.data / f"{recipe.replace(':', '-')}.lock"):
            services = Services(layout)
            try:
                wanted = recipe.replace("@", "-")
                for image in services.records.images():
                    if image.labels.get("recipe") == recipe or image.name in (wanted, f"{wanted}:latest"):
                        return image
                request = BuildRequest(recipe=name, arch=arch or None, name=wanted if arch else None)  # type: ignore[arg-type]
                return asyncio.run(make_image(request, services=services))
            finally:
                services.close()

    return await asyncio.to_thread(build), layout


async def adopt_cached(recipe: str, layout: Layout) -> str:
    """Put a built image into a home; returns its name."""
    image, source = await built(recipe)
    services, cached = Services(layout), Services(source)
    try:
        layers = [layer for layer in cached.records.layers() if layer.id in image.layer_ids]
        for folder in (layout.layers, layout.blobs):
            make_folder(folder)
        for layer in layers:
            _link(source.layer(layer.id), layout.layer(layer.id))
        for blob in image.blob_ids:
            _link(source.blob(blob), layout.blob(blob))
        services.records.add_image(image, layers)
    finally:
        services.close()
        cached.close()
    return image.name


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


async def imported(path: Path, layout: Layout, name: str) -> str:
    """Import a file of an installed package (Memtest86+, U-Boot …)."""
    services = Services(layout)
    try:
        await make_image(ImportRequest(path=str(path), name=name), services=services)
        return find_image(name, services.records.images()).name
    finally:
        services.close()
