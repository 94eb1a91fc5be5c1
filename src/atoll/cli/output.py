"""Printing results: JSON and YAML as the Structs say, tables only as wide as the terminal."""

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from atoll.cli.failures import Format, Settings, printable
from atoll.model.units import format_duration

F = TypeVar("F", bound=Callable[..., Any])
_GAP = "  "
_NARROWEST = 6


def _remember(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    ctx.find_root().ensure_object(Settings).format = "json" if value == "json" else "table"
    return value


def format_option_with(*more: str) -> Callable[[F], F]:
    """`format_option` for a command that knows further formats."""
    return click.option(
        "--format",
        "format",
        type=click.Choice(["table", "json", "yaml", *more]),
        default="table",
        envvar="ATOLL_FORMAT",
        is_eager=True,
        callback=_remember,
        help="How to print it (default: table; ATOLL_FORMAT sets it for all commands).",
    )


def format_option(function: F) -> F:
    """`--format`, with ATOLL_FORMAT as its default. Errors take the form of JSON with it."""
    return format_option_with()(function)


def emit(value: Any, format: Format) -> None:
    """Print a Struct, or what is made of them, as JSON or YAML."""
    import msgspec

    if format == "yaml":
        import yaml

        click.echo(yaml.safe_dump(msgspec.to_builtins(value), sort_keys=False, allow_unicode=True), nl=False)
        return
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def emit_line(value: Any) -> None:
    """Print a Struct as one line of JSON, at once; for what goes on and on."""
    import msgspec

    click.echo(msgspec.json.encode(value))
    sys.stdout.flush()


def write_bytes(data: bytes, *, to_errors: bool = False) -> None:
    """Write to standard output (or error) as it is, at once."""
    stream = (sys.stderr if to_errors else sys.stdout).buffer
    stream.write(data)
    stream.flush()


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table. On a terminal its widest columns are cut so that it fits; in a file or a pipe nothing is cut."""
    click.echo("\n".join(table_lines(headers, rows, terminal_width())))


def print_description(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values below each other; several lines of a value stand below each other too."""
    width = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        for number, line in enumerate(printable(value).split("\n")):
            click.echo(f"{f'{name}:' if number == 0 else '':{width}}{line}")


def terminal_width() -> int | None:
    """Columns of the terminal on standard output; None if that is none. COLUMNS overrules it."""
    if not sys.stdout.isatty():
        return None
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except OSError:
        return None


def table_lines(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """The lines of a table that is at most `width` cells wide, if its columns can be cut so far."""
    lines = [list(headers), *([printable(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(cells(line[column]) for line in lines) for column in range(len(headers))]
    if width is not None:
        widths = fitted(widths, width - len(_GAP) * (len(headers) - 1))
    return [
        _GAP.join(padded(cut(cell, size), size) for cell, size in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def fitted(widths: Sequence[int], available: int) -> list[int]:
    """The widths with the widest made narrower until they fit, none below six cells."""
    result = list(widths)
    while sum(result) > available and max(result) > _NARROWEST:
        result[result.index(max(result))] -= 1
    return result


def cells(text: str) -> int:
    """How many columns of a terminal a text takes: East Asian and emoji characters two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(_cells_of(character) for character in text)


def _cells_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, size: int) -> str:
    """The text in at most `size` cells, with an ellipsis where something is missing."""
    if cells(text) <= size:
        return text
    kept, taken = "", 0
    for character in text:
        taken += _cells_of(character)
        if taken > size - 1:
            break
        kept += character
    return f"{kept}…"


def padded(text: str, size: int) -> str:
    return text + " " * (size - cells(text))


def age(at: float) -> str:
    """How long ago a time (seconds since 1970) was: `2h5m ago`. A clock that was set back makes it `now`."""
    gone = time.time() - at
    return "now" if gone < 1 else f"{format_duration(gone)} ago"


def moment(at: float) -> str:
    """A time with its date, in the user's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
