"""`run` and `create`: options made into a `CreateRequest`."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from atoll.cli.failures import OWN_FAILURE, Format, note, settings
from atoll.cli.options import (
    CARD,
    DURATION,
    IMAGE,
    LIMITS,
    TakesCommand,
    parse_disk,
    parse_nics,
    parse_pairs,
    parse_ports,
    parse_share,
    read_text,
    with_options,
    without_dashes,
)
from atoll.cli.output import emit, format_option
from atoll.cli.supervise import supervision
from atoll.errors import InvalidInput, NotFound
from atoll.model.isolation import IsolationLevel
from atoll.model.requests import CreateRequest
from atoll.model.spec import AcceleratorChoice, Arch, Bus, Firmware, Machine

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost, AsyncVm

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--name", help="Its name; one is made up otherwise."),
    click.option("--cpus", "-c", type=int, help="Virtual CPUs."),
    click.option("--max-cpus", type=int, help="How many it can be given while it runs."),
    click.option("--memory", "-m", metavar="SIZE", help="RAM, such as 2GiB."),
    click.option("--disk-size", metavar="SIZE", help="Size of the first disk; at least the image's."),
    click.option(
        "--disk", "disks", multiple=True, metavar="SPEC",
        help="A further disk: SIZE, or name=…,size=…,bus=…,image=… . Repeatable.",
    ),
    click.option(
        "--publish", "-p", "ports", multiple=True, metavar="PORTS",
        help="[ADDRESS:]HOST:GUEST[/tcp|udp], also ranges. Repeatable.",
    ),
    click.option(
        "--volume", "-v", "shares", multiple=True, metavar="HERE:GUEST[:ro]",
        help="A folder of this computer that the guest sees at GUEST. Repeatable.",
    ),
    click.option(
        "--network", "networks", type=CARD, multiple=True, metavar="NETWORK[,address=…][,mac=…][,group=…][,limit=…]",
        help="A network that it is on; `user` is one of its own (the default), `none` none. Repeatable."
        " Several security groups are written web+db.",
    ),
    click.option("--restrict-network", is_flag=True, help="No way out of the guest; published ports still work."),
    click.option("--mac", help="The address of its network card."),
    click.option("--nic-model", type=click.Choice(["virtio", "e1000e", "e1000"]), help="Its network card."),
    click.option("--cdrom", multiple=True, metavar="IMAGE", help="An imported ISO for a CD drive. Repeatable."),
    click.option("--user", "-u", help="A login made at the first boot."),
    click.option("--password-stdin", is_flag=True, help="Read that login's password from standard input."),
    click.option("--ssh-key", "ssh_keys", multiple=True, metavar="FILE", help="A public key for it. Repeatable."),
    click.option("--user-data", metavar="FILE", help="Cloud-init user data; '-' for standard input."),
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label to find it by. Repeatable."),
    click.option("--rm", "remove_when_stopped", is_flag=True, help="Remove it when it has stopped."),
    *supervision("never"),
    click.option("--arch", type=click.Choice(get_args(Arch)), help="Its processor's architecture."),
    click.option("--machine", type=click.Choice(get_args(Machine)), help="QEMU's machine."),
    click.option("--firmware", type=click.Choice(get_args(Firmware)), help="How it boots."),
    click.option("--accel", type=click.Choice(get_args(AcceleratorChoice)), default="auto", help="What runs it."),
    click.option(
        "--isolation", type=click.Choice(get_args(IsolationLevel)), default="standard",
        help="How it is confined: with all there is (standard), with everything or not at all started (strict), none.",
    ),
    *LIMITS,
    click.option("--cpu-model", help="A CPU model of QEMU's, such as Skylake-Server."),
    click.option("--sockets", type=int, help="CPU sockets."),
    click.option("--threads", type=int, help="Threads of each core."),
    click.option("--disk-bus", type=click.Choice(get_args(Bus)), help="How the guest sees its first disk."),
    click.option("--display", type=click.Choice(["none", "vga", "virtio"]), help="Its graphics card."),
    click.option("--cmdline", help="Added to its kernel's command line."),
]  # fmt: skip


def _create_options(function: F) -> F:
    return with_options(_OPTIONS, function)


def _request(image: str | None, *, password_stdin: bool, **options: Any) -> CreateRequest:
    """The request that the options say. Raises `InvalidInput`, or `StorageFailed` for a file that can't be read."""
    keys = [
        line.strip() for path in options.pop("ssh_keys") for line in read_text(path, option="--ssh-key").split("\n")
    ]
    user_data = options.pop("user_data")
    if password_stdin and user_data == "-":
        raise InvalidInput("--password-stdin and --user-data - both read standard input", next_step="Use a file.")
    networks = options.pop("networks")
    if "none" in networks and len(networks) > 1:
        raise InvalidInput("--network none and other networks don't go together", next_step="Leave it away.")
    alone = networks in ((), ("user",), ("none",))
    return CreateRequest(
        image=image,
        network="none" if networks == ("none",) else "user",
        nics=() if alone else parse_nics(networks),
        ports=tuple(port for text in options.pop("ports") for port in parse_ports(text)),
        disks=tuple(parse_disk(text) for text in options.pop("disks")),
        shares=tuple(parse_share(text) for text in options.pop("shares")),
        labels=parse_pairs(options.pop("labels"), option="--label"),
        ssh_keys=tuple(key for key in keys if key and not key.startswith("#")),
        user_data=None if user_data is None else read_text(user_data, option="--user-data"),
        password=_password() if password_stdin else None,
        accelerator=options.pop("accel"),
        **options,
    )


def _password() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise InvalidInput("there is no password on standard input", next_step="Pipe it in, or leave it away.")
    return password


@click.command("create")
@click.argument("image", required=False, type=IMAGE)
@_create_options
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def create_command(image: str | None, quiet: bool, format: Format, **options: Any) -> None:
    """Make a VM from IMAGE without starting it; print its name.

    Without an image it has only the disks and CDs that are given.

    \b
    Examples:
      atoll create tiny --name v1
      atoll create debian:13 --name db --cpus 2 --memory 2GiB --disk-size 20GiB
      atoll create --name installer --cdrom alpine-iso --disk 10GiB
    """
    from atoll.cli.progress import Shown
    from atoll.cli.session import perform

    request = _request(image, **options)

    async def action(host: "AsyncHost") -> None:
        with Shown(f"creating {request.name or request.image or 'a VM'}", quiet=quiet) as shown:
            vm = await host.create(request, report=shown.report)
        await _tell(vm, format)

    perform(action)


async def _tell(vm: "AsyncVm", format: Format) -> None:
    if format == "table":
        click.echo(vm.name)
    else:
        emit(await vm.info(), format)


@click.command("run", cls=TakesCommand)
@click.argument("image", required=False, type=IMAGE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@_create_options
@click.option("--detach", "-d", is_flag=True, help="Don't wait until it is ready.")
@click.option("--interactive", "-i", is_flag=True, help="Give the command this standard input.")
@click.option("--tty", "-t", is_flag=True, help="Run the command in a terminal.")
@click.option("--timeout", type=DURATION, default="10m", help="How long it may take to be ready (default: 10m).")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@format_option
def run_command(
    image: str | None,
    command: tuple[str, ...],
    detach: bool,
    interactive: bool,
    tty: bool,
    timeout: float,
    quiet: bool,
    format: Format,
    **options: Any,
) -> int:
    """Make a VM from IMAGE, start it, and wait until it is ready; print its name.

    With a command after `--`, run that in it as well; then its exit code is ours (125 if Atoll itself fails), and with
    --rm the VM is removed afterwards. Ctrl-C before it is ready removes the VM again.

    \b
    Examples:
      atoll run tiny --name web -p 8080:80
      atoll run debian:13 --name db --cpus 2 --memory 2GiB --user me --ssh-key ~/.ssh/id_ed25519.pub
      atoll run tiny --name db --network lab --network user
      atoll run tiny --name demo -p 8081:80 --suspend-when-idle 30m
      atoll run --rm tiny -- uname -a
      atoll run -d tiny
    """
    from atoll.cli.session import perform

    if image == "--":  # `run --cdrom x -- ls`: there is no image, and TakesCommand's mark stands in its place
        image, command = None, ("--", *command)
    words = without_dashes(command)
    if words:
        settings().own_failure = OWN_FAILURE
    if detach and words:
        raise InvalidInput("--detach doesn't wait, so there is nothing to run the command in", next_step="Drop it.")
    if interactive and options["password_stdin"]:
        raise InvalidInput("-i and --password-stdin both read standard input", next_step="Leave one of them away.")
    request = _request(image, **options)

    async def action(host: "AsyncHost") -> int:
        vm = await _started(host, request, wait=not detach, timeout=timeout, quiet=quiet)
        if not words:
            await _tell(vm, format)
            return 0
        try:
            return await _run_in(vm, words, interactive=interactive, tty=tty)
        finally:
            if request.remove_when_stopped:
                await _remove(vm)

    return perform(action)


async def _started(host: "AsyncHost", request: CreateRequest, *, wait: bool, timeout: float, quiet: bool) -> "AsyncVm":
    """A VM that was made and started. Cancelled on the way, it is removed; when it fails, it stays to be looked at."""
    from atoll.cli.progress import Shown

    with Shown(f"running {request.name or request.image or 'a VM'}", quiet=quiet) as shown:
        vm = await host.create(request, report=shown.report)
        try:
            shown.step("starting")
            await vm.start()
            if wait:
                shown.step("waiting until it is ready")
                await vm.wait("ready", timeout=timeout)
        except asyncio.CancelledError:
            await _remove(vm)
            raise
        except Exception:
            if request.remove_when_stopped:
                await _remove(vm)
            else:
                note(f"the VM '{vm.name}' is kept; `atoll rm --force {vm.name}` removes it.")
            raise
    return vm


async def _remove(vm: "AsyncVm") -> None:
    with contextlib.suppress(NotFound):  # with --rm, whoever saw it stop may have removed it
        await vm.rm(force=True)


async def _run_in(vm: "AsyncVm", words: tuple[str, ...], *, interactive: bool, tty: bool) -> int:
    from atoll.cli.execute import run_in_terminal, run_streamed
    from atoll.model.vm import ExecRequest

    request = ExecRequest(argv=words)
    if tty:
        return await run_in_terminal(vm, request)
    return await run_streamed(vm, request, interactive=interactive)
