"""What `image` makes images of: `build`, `pull`, `import`, `create`."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from atoll.cli.failures import Format
from atoll.cli.options import VM
from atoll.cli.output import emit, format_option
from atoll.model.image import Image, SourceFormat
from atoll.model.requests import BuildRequest, ImportRequest, PullRequest
from atoll.model.spec import Arch, Firmware

if TYPE_CHECKING:
    from atoll.cli.progress import Shown
    from atoll.platform.api import AsyncHost

F = TypeVar("F", bound=Callable[..., Any])


def _naming(function: F) -> F:
    """`--name`, `--arch`, `--quiet`, `--format`."""
    for option in (
        click.option("--name", help="What to call it, such as web:v2."),
        click.option("--arch", type=click.Choice(get_args(Arch)), help="For which processors (default: this one's)."),
        click.option("--quiet", "-q", is_flag=True, help="No progress."),
        format_option,
    ):
        function = option(function)
    return function


def _make(title: str, make: "Callable[[AsyncHost, Shown], Awaitable[Image]]", *, quiet: bool, format: Format) -> None:
    """Make an image with progress, and print its name."""
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Image:
        with Shown(title, quiet=quiet) as shown:
            return await make(host, shown)

    image = perform(action)
    if format == "table":
        click.echo(image.name)
    else:
        emit(image, format)


@click.command("build")
@click.argument("recipe")
@_naming
def build(recipe: str, name: str | None, arch: Arch | None, quiet: bool, format: Format) -> None:
    """Build an image from a distribution's packages, without root: tiny, debian:12, debian:13.

    \b
    Examples:
      atoll image build tiny
      atoll image build debian:13 --arch aarch64
    """
    request = BuildRequest(recipe=recipe, name=name, arch=arch)
    _make(
        f"building {recipe}",
        lambda host, shown: host.images.build(request, report=shown.report),
        quiet=quiet,
        format=format,
    )


@click.command("pull")
@click.argument("source", metavar="NAME|URL")
@click.option("--checksum", help="What it has to be: sha256:… or sha512:… .")
@_naming
def pull(source: str, checksum: str | None, name: str | None, arch: Arch | None, quiet: bool, format: Format) -> None:
    """Download an image: by its name in the catalogue, or from an address. A broken download goes on where it stopped.

    \b
    Examples:
      atoll image pull alpine:3.22
      atoll image pull https://example.org/disk.qcow2 --checksum sha256:…
    """
    request = PullRequest(source=source, name=name, checksum=checksum, arch=arch)
    _make(
        f"pulling {source}",
        lambda host, shown: host.images.pull(request, report=shown.report),
        quiet=quiet,
        format=format,
    )


@click.command("import")
@click.argument("file")
@click.option("--file-format", type=click.Choice(get_args(SourceFormat)), help="What it is (default: by its bytes).")
@click.option("--initrd", metavar="FILE", help="With a kernel: its initial RAM disk.")
@click.option("--cmdline", default="", help="With a kernel: its command line.")
@click.option("--firmware", type=click.Choice(get_args(Firmware)), help="How it boots.")
@click.option("--agent", is_flag=True, help="The QEMU guest agent is installed in it.")
@click.option("--description", default="", help="A line about it.")
@_naming
def import_file(file: str, file_format: Any, quiet: bool, format: Format, **options: Any) -> None:
    """Make an image of a file: qcow2, raw, VMDK, VDI, VHD, VHDX, ISO, floppy, or a kernel.

    A file that refers to others is refused.

    \b
    Examples:
      atoll image import disk.vmdk --name old-server
      atoll image import alpine.iso --name alpine-iso
      atoll image import vmlinuz --initrd initrd.img --cmdline 'console=ttyS0'
    """
    request = ImportRequest(path=file, format=file_format, **options)
    _make(
        f"importing {file}",
        lambda host, shown: host.images.import_file(request, report=shown.report),
        quiet=quiet,
        format=format,
    )


@click.command("create")
@click.argument("source", metavar="VM|VM@SNAPSHOT", type=VM)
@click.argument("name")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def create(source: str, name: str, quiet: bool, format: Format) -> None:
    """Make an image of a VM or of one of its snapshots, in a moment at any size; print its name.

    Both stand on the same frozen layers. A VM that is made from it gets an identity of its own. A running VM's disks
    are taken as if its power had failed just now.

    \b
    Examples:
      atoll image create web@clean web:v2
      atoll image create web base
    """
    _make(
        f"making {name} of {source}",
        lambda host, shown: host.images.create(source, name, report=shown.report),
        quiet=quiet,
        format=format,
    )
