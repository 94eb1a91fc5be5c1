"""`cp`: files and folders into a VM and out of it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from atoll.cli.output import write_bytes
from atoll.errors import GuestFailed, InvalidInput

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost, AsyncVm

# A guest's path: absolute, or with a drive letter.
_ABSOLUTE = re.compile(r"/|[A-Za-z]:[\\/]")


class Place(NamedTuple):
    """One side of a copy: a path here (`vm` is None), or in a VM."""

    vm: str | None
    path: str


def parse_place(text: str) -> Place:
    """`web:/srv/site`, or a path of this computer; one with a colon is written `./a:b`. Raises `InvalidInput`."""
    vm, colon, path = text.partition(":")
    if not colon or "/" in vm or vm.startswith("."):
        return Place(None, text)
    if not vm:
        raise InvalidInput(f"'{text}' names no VM", next_step="Write VM:/PATH, or ./FILE for a file here.")
    if not _ABSOLUTE.match(path):
        raise InvalidInput(
            f"'{text}': the path in the guest isn't absolute", next_step=f"Write {vm}:/{path or 'PATH'}."
        )
    return Place(vm, path)


@click.command("cp")
@click.argument("source")
@click.argument("destination")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def cp_command(source: str, destination: str, quiet: bool) -> None:
    """Copy a file or a folder into a VM, or out of it, with its modes; one side is VM:/PATH.

    Into a folder that exists, else under that name. `-` is standard input or output, for one file.

    \b
    Examples:
      atoll cp site web:/srv
      atoll cp web:/var/log/nginx ./logs
      atoll cp web:/etc/hostname -
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    here, there = parse_place(source), parse_place(destination)
    if (here.vm is None) == (there.vm is None):
        raise InvalidInput(
            "one side has to be in a VM, and the other one here",
            next_step="Write it like `atoll cp FILE VM:/PATH`. Between two VMs, copy to this computer first.",
        )

    async def action(host: "AsyncHost") -> None:
        vm = await host.get(here.vm or there.vm or "")
        if source == "-":
            await _from_standard_input(vm, there.path)
        elif destination == "-":
            await _to_standard_output(vm, here.path)
        else:
            with Shown(f"copying {source} to {destination}", quiet=quiet) as shown:
                if here.vm is None:
                    await vm.copy_to(Path(here.path), there.path, report=shown.report)
                else:
                    await vm.copy_from(here.path, Path(there.path), report=shown.report)

    perform(action, cancelled="what was copied so far may be there")


async def _from_standard_input(vm: "AsyncVm", path: str) -> None:
    from atoll.cli.streams import standard_input

    result = await vm.exec(["sh", "-c", 'exec cat > "$0"', path], stdin=standard_input())
    _check(result.exit_code, result.stderr, f"{vm.name}: can't write {path}")


async def _to_standard_output(vm: "AsyncVm", path: str) -> None:
    result = await vm.exec(["cat", "--", path], on_stdout=write_bytes)
    _check(result.exit_code, result.stderr, f"{vm.name}: can't read {path}")


def _check(code: int, stderr: bytes, what: str) -> None:
    if code != 0:
        raise GuestFailed(what, stderr.decode(errors="replace").strip() or f"exit code {code}")
