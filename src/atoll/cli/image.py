"""`image`: build, pull, import, create, list, name, remove."""

from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format
from atoll.cli.image_make import build, create, import_file, pull
from atoll.cli.options import IMAGE
from atoll.cli.output import age, emit, format_option, moment, print_description, print_table
from atoll.model.image import Image
from atoll.model.units import format_size

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.group("image")
def image_command() -> None:
    """Build, pull or import what VMs start from.

    \b
    Examples:
      atoll image build tiny
      atoll image ls
    """


for _command in (build, create, pull, import_file):
    image_command.add_command(_command)


@image_command.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Only names, one a line.")
@format_option
def ls(quiet: bool, format: Format) -> None:
    """List the images of this computer.

    \b
    Example:
      atoll image ls
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[Image]:
        return await host.images.ls()

    images = perform(action, cancelled="")
    if quiet:
        for each in images:
            click.echo(each.name)
    elif format != "table":
        emit(images, format)
    else:
        print_table(("NAME", "ID", "ARCH", "BOOT", "SIZE", "CREATED", "DESCRIPTION"), [_row(each) for each in images])


def _row(image: Image) -> tuple[str, ...]:
    size = max((disk.size for disk in image.disks), default=0)
    names = ", ".join((image.name, *image.tags))
    boots = image.firmware
    return (
        names, image.short_id, image.arch, boots, format_size(size) if size else "-", age(image.created_at),
        image.description or "-",
    )  # fmt: skip


@image_command.command("show")
@click.argument("image", type=IMAGE)
@format_option
def show(image: str, format: Format) -> None:
    """Tell all about an image.

    \b
    Example:
      atoll image show tiny
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Image:
        return await host.images.show(image)

    found = perform(action, cancelled="")
    if format != "table":
        emit(found, format)
        return
    pairs = [
        ("Name", "\n".join((found.name, *found.tags))),
        ("Id", found.id),
        ("Description", found.description),
        ("Architecture", found.arch),
        ("Boots by", ", ".join(found.firmwares)),
        ("Disks", "\n".join(f"{disk.name} {format_size(disk.size)} {disk.bus} {disk.media}" for disk in found.disks)),
        ("Memory", format_size(found.memory) if found.memory else ""),
        ("Guest agent", "yes" if found.guest.agent else "no"),
        ("Source", found.source),
        ("SHA-256", found.sha256),
        ("Created", f"{moment(found.created_at)} ({age(found.created_at)})"),
        ("Labels", "\n".join(f"{key}={value}" for key, value in found.labels.items())),
    ]
    print_description([pair for pair in pairs if pair[1]])


@image_command.command("tag")
@click.argument("image", type=IMAGE)
@click.argument("name")
def tag(image: str, name: str) -> None:
    """Give an image a further name; a name that another image has moves to this one.

    \b
    Example:
      atoll image tag debian:13 base:stable
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        await host.images.tag(image, name)

    perform(action)


@image_command.command("rm")
@click.argument("images", nargs=-1, required=True, type=IMAGE, metavar="IMAGE...")
@click.option("--force", "-f", is_flag=True, help="By its id: also when it has several names.")
def rm(images: tuple[str, ...], force: bool) -> int:
    """Take names of images away, and the images with their last one. VMs made from them go on.

    \b
    Example:
      atoll image rm tiny debian:12
    """
    from atoll.cli.failures import exit_code_of, settings, tell
    from atoll.cli.session import perform
    from atoll.errors import AtollError

    found = settings()

    async def action(host: "AsyncHost") -> int:
        code = 0
        for image in images:
            try:
                await host.images.rm(image, force=force)
            except AtollError as error:
                tell(error, found.format)
                code = code or exit_code_of(error, found)
        return code

    return perform(action)


@image_command.command("prune")
@click.option("--all", "-a", "every", is_flag=True, help="Also images that no VM was made from.")
@click.option("--dry-run", "-n", is_flag=True, help="Only tell what would be removed.")
@format_option
def prune(every: bool, dry_run: bool, format: Format) -> None:
    """Remove layers and files that no image and no VM needs.

    \b
    Examples:
      atoll image prune --dry-run
      atoll image prune --all
    """
    from atoll.cli.session import perform
    from atoll.cli.upkeep import print_freed

    async def action(host: "AsyncHost") -> list[tuple[str, int]]:
        return await host.images.prune(every=every, dry_run=dry_run)

    print_freed(perform(action), format, dry_run=dry_run)


@image_command.command("catalogue")
@format_option
def catalogue(format: Format) -> None:
    """List the names that `image build` and `image pull` know.

    \b
    Example:
      atoll image catalogue
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[tuple[str, str]]:
        return await host.images.catalogue()

    known = perform(action, cancelled="")
    if format != "table":
        emit([{"name": name, "description": line} for name, line in known], format)
        return
    print_table(("NAME", "DESCRIPTION"), known)
