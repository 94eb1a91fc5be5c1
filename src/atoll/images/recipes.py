"""The images that Atoll builds itself from packages, by name."""

from pathlib import Path
from typing import Literal

from atoll.errors import InvalidInput
from atoll.images.made import Made, Report
from atoll.layout import Layout
from atoll.model.names import check_image_name
from atoll.model.requests import BuildRequest
from atoll.model.spec import Arch

RECIPES = {
    "tiny": "Debian's cloud kernel, busybox and the guest agent: boots in seconds, built in seconds",
    "debian:12": "Debian 12 (bookworm) with systemd, cloud-init and the guest agent",
    "debian:13": "Debian 13 (trixie) with systemd, cloud-init and the guest agent",
}


async def build(request: BuildRequest, *, layout: Layout, folder: Path, report: Report) -> Made:
    """Build by recipe. Raises `InvalidInput` for an unknown one, `BuildFailed`, `MissingTool`."""
    from atoll.qemu.probe import host_arch

    recipe = request.recipe.removesuffix(":latest")
    if recipe not in RECIPES:
        raise InvalidInput(
            f"there is no recipe '{request.recipe}'",
            f"there are {', '.join(RECIPES)}",
            "Or pull one: `atoll image catalogue`.",
        )
    arch: Arch = request.arch or host_arch()
    suffix = "" if arch == host_arch() else f"-{arch}"
    name = check_image_name(request.name or _with_suffix(recipe, suffix))
    if recipe == "tiny":
        from atoll.images.tiny import build_tiny

        return await build_tiny(layout=layout, folder=folder, arch=arch, name=name, report=report)
    from atoll.images.debian import build_debian

    release: Literal["12", "13"] = "12" if recipe == "debian:12" else "13"
    return await build_debian(layout=layout, folder=folder, release=release, arch=arch, name=name, report=report)


def _with_suffix(recipe: str, suffix: str) -> str:
    """`tiny` → `tiny-aarch64`, `debian:13` → `debian-aarch64:13`: another architecture has another name."""
    name, colon, tag = recipe.partition(":")
    return f"{name}{suffix}{colon}{tag}"
