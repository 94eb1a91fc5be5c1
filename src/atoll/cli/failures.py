"""How the command line tells what failed, and with which exit code it ends."""

import os
import sys
import traceback
from dataclasses import dataclass
from typing import Literal

import click

from atoll.errors import AtollError, Cancelled, InvalidInput

Format = Literal["table", "json", "yaml"]
OWN_FAILURE = 125
"""The exit code of `exec` and `run -- CMD` when not the command but Atoll failed, as docker has it."""


class ReaderGone(Exception):
    """Our output was closed. click would end with 1 if it saw the `BrokenPipeError` itself."""


@dataclass
class Settings:
    """What a command line has set so far; the context's `obj`."""

    format: Format = "table"
    host: str | None = None
    """Whose VMs are meant; None for this computer's."""
    own_failure: int | None = None
    """Set by commands whose exit code is that of a program in the guest."""


def settings() -> Settings:
    """Those of the running command."""
    return click.get_current_context().find_root().ensure_object(Settings)


def printable(text: str) -> str:
    """The text without control characters: what a guest or an image wrote shall not steer the user's terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


def tell(error: AtollError, format: Format) -> None:
    """One line on standard error; one JSON object where JSON is wanted."""
    if format == "json":
        import json

        told = {"code": error.code, "what": error.what, "why": error.why, "next_step": error.next_step}
        click.echo(json.dumps(told), err=True)
        return
    click.echo(f"Error: {printable(' '.join(error.text.split()))}", err=True)


def note(text: str) -> None:
    """Something the user should know; not a failure."""
    click.echo(f"Note: {printable(text)}", err=True)


def exit_code_of(error: AtollError, found: Settings) -> int:
    if found.own_failure is not None and not isinstance(error, Cancelled):
        return found.own_failure
    return error.exit_code


def handled(error: BaseException, found: Settings) -> int:
    """Tell any exception as the user should read it; the exit code."""
    if os.environ.get("ATOLL_DEBUG") == "1":
        traceback.print_exception(error)
    match error:
        case AtollError():
            tell(error, found.format)
            return exit_code_of(error, found)
        case click.UsageError():
            _tell_usage(error, found)
            return error.exit_code
        case click.ClickException():
            tell(AtollError(error.format_message()), found.format)
            return error.exit_code
        case click.Abort() | KeyboardInterrupt():
            return 130
        case ReaderGone() | BrokenPipeError():
            # Whoever read our output went away (`atoll ls | head`): end as quietly as a program that SIGPIPE ends.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
            return 141
        case OSError():
            tell(AtollError("the system refused something", str(error), _REPORT), found.format)
        case _:
            tell(AtollError("Atoll failed", f"{type(error).__name__}: {error}", _REPORT), found.format)
    return found.own_failure or 1


_REPORT = "That is a fault of Atoll's: report it with what `atoll version` says, and with ATOLL_DEBUG=1 set."


def _tell_usage(error: click.UsageError, found: Settings) -> None:
    path = error.ctx.command_path if error.ctx else "atoll"
    what, meant, near = error.format_message().partition("Did you mean")
    tell(InvalidInput(what.strip().rstrip("."), next_step=f"{meant}{near} See `{path} --help`.".strip()), found.format)
