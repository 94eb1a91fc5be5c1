"""What users write after options, made into what the façade takes. Everything here raises `InvalidInput`."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from atoll.errors import InvalidInput, from_os_error
from atoll.model.requests import DiskRequest, NicRequest, ShareRequest
from atoll.model.spec import PortSpec
from atoll.model.units import parse_duration

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])
_PORT = re.compile(
    r"(?:(?P<address>[0-9.]+|localhost):)?(?P<host>\d+)(?:-(?P<host_end>\d+))?"
    r":(?P<guest>\d+)(?:-(?P<guest_end>\d+))?(?:/(?P<protocol>tcp|udp))?",
    re.ASCII,
)
_PORT_FORM = "Write [ADDRESS:]HOST:GUEST[/tcp|udp], such as 8080:80, 0.0.0.0:8080:80 or 5353:53/udp."
LARGEST_PORT = 65535


LIMITS = (
    click.option("--cpu-limit", type=float, metavar="CPUS", help="How many processors' time it may take; 0 for all."),
    click.option("--io-limit", metavar="SIZE", help="What its disks move in a second, such as 50MiB; 0 for all."),
    click.option("--iops-limit", type=int, metavar="N", help="Operations of its disks in a second; 0 for all."),
)


def with_limits(function: F) -> F:
    return with_options(LIMITS, function)


def with_options(options: Iterable[Callable[[F], F]], function: F) -> F:
    for option in reversed(list(options)):
        function = option(function)
    return function


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """`30s`, `2m`, or seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return parse_duration(value)


class VmReference(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A VM's name; the shell completes it."""

    name = "vm"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from atoll.cli.completion import vm_names

        return [CompletionItem(name) for name in vm_names() if name.startswith(incomplete)]


class SourceReference(VmReference):
    """A VM, or a snapshot as VM@SNAPSHOT; the shell completes both."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from atoll.cli.completion import snapshot_names

        vm, at, begun = incomplete.partition("@")
        if not at:
            return super().shell_complete(ctx, param, incomplete)
        return [CompletionItem(f"{vm}@{name}") for name in snapshot_names(vm) if name.startswith(begun)]


class SnapshotReference(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """The name of a snapshot of the VM that the argument `vm` names; the shell completes it."""

    name = "snapshot"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from atoll.cli.completion import snapshot_names

        names = snapshot_names(ctx.params.get("vm") or "")
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class ImageReference(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """An image's name; the shell completes it."""

    name = "image"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if "/" in value and not (ctx and ctx.resilient_parsing) and Path(value).is_file():
            raise InvalidInput(
                f"'{value}' is a file, not an image", next_step=f"Import it first: `atoll image import {value}`."
            )
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from atoll.cli.completion import image_names

        return [CompletionItem(name) for name in image_names() if name.startswith(incomplete)]


class NetworkReference(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A network's name; the shell completes it."""

    name = "network"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from atoll.cli.completion import network_names

        names = [*self.also, *network_names()]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]

    def __init__(self, *also: str) -> None:
        self.also = also


class GroupReference(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A security group's name; the shell completes it."""

    name = "group"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        from atoll.cli.completion import group_names

        return [CompletionItem(name) for name in group_names() if name.startswith(incomplete)]


NETWORK, CARD, GROUP = NetworkReference(), NetworkReference("user", "none"), GroupReference()
DURATION, VM, IMAGE = Duration(), VmReference(), ImageReference()
VM_OR_SNAPSHOT, SNAPSHOT = SourceReference(), SnapshotReference()


def parse_ports(text: str) -> list[PortSpec]:
    """`8080:80`, `0.0.0.0:8080:80/udp`, and ranges of the same length on both sides: `8000-8010:8000-8010`."""
    if "[" in text:
        raise InvalidInput(f"'{text}': publishing on an IPv6 address isn't supported", next_step="Use an IPv4 one.")
    match = _PORT.fullmatch(text)
    if match is None:
        raise InvalidInput(f"'{text}' doesn't publish a port", next_step=_PORT_FORM)
    hosts = _port_range(match["host"], match["host_end"])
    guests = _port_range(match["guest"], match["guest_end"])
    if len(hosts) != len(guests):
        raise InvalidInput(f"'{text}': the ranges have {len(hosts)} and {len(guests)} ports", next_step=_PORT_FORM)
    return [
        PortSpec(
            host_port=host,
            guest_port=guest,
            host_address=_address(match["address"]),
            protocol="udp" if match["protocol"] == "udp" else "tcp",
        )
        for host, guest in zip(hosts, guests, strict=True)
    ]


def _port_range(first: str, last: str | None) -> range:
    low, high = int(first), int(last or first)
    if not 1 <= low <= high <= LARGEST_PORT:
        raise InvalidInput(
            f"'{first}{f'-{last}' if last else ''}' is no port", next_step=f"Ports go from 1 to {LARGEST_PORT}."
        )
    return range(low, high + 1)


def _address(text: str | None) -> str:
    if text in (None, "localhost"):
        return "127.0.0.1"
    import ipaddress

    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise InvalidInput(f"'{text}' is no IPv4 address", next_step=_PORT_FORM) from None


def parse_pairs(texts: Iterable[str], *, option: str) -> dict[str, str]:
    """`KEY=VALUE` of `--label`, `--env` …"""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InvalidInput(f"{option} '{text}' is no KEY=VALUE", next_step=f"Write it like {option} tier=web.")
        pairs[key] = value
    return pairs


def parse_disk(text: str) -> DiskRequest:
    """A size (`10GiB`), or `name=data,size=10GiB,bus=nvme,image=NAME` in any order."""
    if "=" not in text:
        return DiskRequest(size=text)
    import msgspec

    pairs = parse_pairs(text.split(","), option="--disk")
    try:
        return msgspec.convert(pairs, DiskRequest)
    except msgspec.ValidationError as error:
        raise InvalidInput(
            f"--disk '{text}' can't be used", str(error), "Write SIZE, or name=…,size=…,bus=…,image=…."
        ) from None


def parse_nics(texts: Iterable[str]) -> tuple[NicRequest, ...]:
    """`NETWORK`, with `,address=…`, `,mac=…`, `,group=…` and `,limit=…` after it."""
    nics = []
    for text in texts:
        network, *rest = text.split(",")
        pairs = parse_pairs(rest, option="--network")
        if unknown := pairs.keys() - {"address", "mac", "group", "limit"}:
            raise InvalidInput(
                f"--network '{text}': there is no '{min(unknown)}'",
                next_step="Write NETWORK,address=…,mac=…,group=…,limit=….",
            )
        nic = NicRequest(
            network=network,
            address=pairs.get("address"),
            mac=pairs.get("mac"),
            groups=tuple(pairs["group"].split("+")) if "group" in pairs else (),
            limit=parse_rate(pairs.get("limit", "0")),
        )
        nics.append(nic)
    return tuple(nics)


def parse_share(text: str) -> ShareRequest:
    """`HERE:GUEST`, `HERE:GUEST:ro`; a colon of a name is written `\\:`."""
    parts = [part.replace("\\:", ":") for part in re.split(r"(?<!\\):", text)]
    if len(parts) not in (2, 3) or not all(parts) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise InvalidInput(
            f"'{text}' shares no folder",
            next_step="Write HERE:GUEST or HERE:GUEST:ro, such as ./site:/srv/site; \\: for a colon in a name.",
        )
    return ShareRequest(host_path=parts[0], guest_path=parts[1], read_only=parts[2:] == ["ro"])


def parse_percent(text: str) -> float:
    """`5%`, or `5`."""
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise InvalidInput(f"'{text}' is no percentage", next_step="Write it like 5%.") from None


def parse_rate(text: str) -> int:
    """`10Mbit`, `500kbit`, `1Gbit`: bytes a second."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([kmg]?)bit)?", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise InvalidInput(f"'{text}' is no rate", next_step="Write it like 10Mbit.")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[(match[2] or "").lower()] / 8)


def read_text(path: str, *, option: str) -> str:
    """The text of a file; of standard input for `-`. Raises `StorageFailed` too."""
    try:
        with click.open_file(path, "r", encoding="utf-8") as file:
            return str(file.read())
    except UnicodeDecodeError:
        raise InvalidInput(f"{option} {path}: that is no text", next_step="Give a file in UTF-8.") from None
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error


class TakesCommand(click.Command):
    """A command whose last words are a command for the guest: `exec web -- ls -l`.

    Without `--`, `exec web ls -l` works as with docker: all after the VM's name belongs to the command. click takes
    the first `--` away, so it is doubled here: a literal one in the command stays.
    """

    takes_command_at_once = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args = [*args[:at], "--", *args[at:]]
        elif self.takes_command_at_once:
            ctx.allow_interspersed_args = False
        return super().parse_args(ctx, args)


def without_dashes(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command that `TakesCommand` has found, without the `--` before it."""
    return words[1:] if words[:1] == ("--",) else words
