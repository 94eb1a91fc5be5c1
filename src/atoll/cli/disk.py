"""`disk add`, `disk rm`, `disk resize`, `disk ls`."""

from typing import TYPE_CHECKING, get_args

import click

from atoll.cli.change import tell_changes
from atoll.cli.failures import Format
from atoll.cli.options import IMAGE, VM
from atoll.cli.output import emit, format_option, print_table
from atoll.errors import InvalidInput
from atoll.model.requests import DiskRequest
from atoll.model.spec import Bus, DiskSpec
from atoll.model.units import format_size
from atoll.model.vm import Change

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.group("disk")
def disk_command() -> None:
    """Give a VM further disks, make them larger, take them away.

    \b
    Example:
      atoll disk add web 10GiB --name data
    """


@disk_command.command("add")
@click.argument("vm", type=VM)
@click.argument("size", required=False)
@click.option("--name", default="", help="Its name (default: data1, data2 …).")
@click.option("--image", type=IMAGE, help="Start from this image's disk, or put this ISO into a drive.")
@click.option("--bus", type=click.Choice(get_args(Bus)), help="How the guest sees it.")
@format_option
def add(vm: str, size: str | None, name: str, image: str | None, bus: Bus | None, format: Format) -> None:
    """Add a blank disk of SIZE, or one from an image. At once where it can be while the VM runs.

    \b
    Examples:
      atoll disk add web 10GiB --name data
      atoll disk add web --image alpine-iso
    """
    from atoll.cli.session import perform

    if size is None and image is None:
        raise InvalidInput("the disk has no size", next_step=f"Write it, such as `atoll disk add {vm} 10GiB`.")
    request = DiskRequest(name=name, size=size, image=image, bus=bus)

    async def action(host: "AsyncHost") -> tuple[DiskSpec, Change]:
        return await (await host.get(vm)).disk_add(request)

    disk, change = perform(action)
    if format == "table":
        tell_changes([change], format)
    else:
        emit({"disk": disk, "change": change}, format)


@disk_command.command("rm")
@click.argument("vm", type=VM)
@click.argument("disk")
@format_option
def rm(vm: str, disk: str, format: Format) -> None:
    """Take a disk away, with all that is on it.

    \b
    Example:
      atoll disk rm web data
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Change:
        return await (await host.get(vm)).disk_rm(disk)

    tell_changes([perform(action)], format)


@disk_command.command("resize")
@click.argument("vm", type=VM)
@click.argument("disk")
@click.argument("size")
@format_option
def resize(vm: str, disk: str, size: str, format: Format) -> None:
    """Make a disk larger. The file system on it is the guest's to grow.

    \b
    Example:
      atoll disk resize web data 40GiB
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Change:
        return await (await host.get(vm)).disk_resize(disk, size)

    tell_changes([perform(action)], format)


@disk_command.command("ls")
@click.argument("vm", type=VM)
@format_option
def ls(vm: str, format: Format) -> None:
    """List a VM's disks.

    \b
    Example:
      atoll disk ls web
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[DiskSpec]:
        return await (await host.get(vm)).disks()

    disks = perform(action, cancelled="")
    if format != "table":
        emit(disks, format)
        return
    rows = [(each.name, format_size(each.size), each.bus, each.media) for each in disks]
    print_table(("NAME", "SIZE", "BUS", "KIND"), rows)
