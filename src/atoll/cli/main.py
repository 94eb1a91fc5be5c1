"""The command `atoll`: finds a command by its name, imports it then, and tells failures.

Start-up time is the reason for the table of names: importing all commands would take longer than `atoll ls` may.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise, takewhile
from typing import Any

import click

from atoll import __version__
from atoll.cli.failures import Format, ReaderGone, Settings, handled
from atoll.errors import InvalidInput

# A section of the help, its commands, and the module of each. `port` is `port_command` there.
SECTIONS: dict[str, dict[str, str]] = {
    "Virtual machines": {
        "run": "create",
        "create": "create",
        "start": "lifecycle",
        "stop": "lifecycle",
        "restart": "lifecycle",
        "pause": "lifecycle",
        "suspend": "fork",
        "resume": "lifecycle",
        "rm": "lifecycle",
        "rename": "lifecycle",
        "ls": "listing",
        "show": "listing",
        "set": "change",
        "wait": "lifecycle",
        "port": "port",
        "net": "net",
        "disk": "disk",
        "share": "share",
    },
    "Inside a virtual machine": {
        "exec": "execute",
        "shell": "terminal",
        "console": "terminal",
        "cp": "copy",
        "logs": "look",
        "screenshot": "look",
        "vnc": "forward",
        "type": "look",
        "key": "look",
        "top": "top",
    },
    "History": {
        "snapshot": "history",
        "history": "history",
        "restore": "history",
        "diff": "diff",
        "forget": "history",
        "clone": "history",
        "fork": "fork",
        "pool": "fork",
        "export": "bundle",
        "import": "bundle",
    },
    "Backups": {"backup": "backup"},
    "Images": {"image": "image"},
    "This computer": {
        "serve": "serve",
        "shutdown": "shutdown",
        "token": "token",
        "audit": "audit",
        "host": "host",
        "events": "journal",
        "operation": "journal",
        "doctor": "system",
        "fsck": "upkeep",
        "prune": "upkeep",
        "completion": "completion",
        "version": "system",
    },
}
ALIASES = {"list": "ls", "ps": "ls", "images": "image", "network": "net", "remove": "rm", "delete": "rm"}
"""Names that users of other tools try first. They work, and aren't listed."""
_MODULES = {name: module for section in SECTIONS.values() for name, module in section.items()}


class Root(click.Group):
    """Commands that are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in _MODULES:
            return None
        found = getattr(import_module(f"atoll.cli.{_MODULES[name]}"), f"{name}_command")
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in ALIASES and args[0] not in _MODULES and not args[0].startswith("-"):
            raise click.UsageError(f"there is no command '{args[0]}'{_suggestion(args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            rows = []
            for name in names:
                command = self.get_command(ctx, name)
                assert command is not None
                rows.append((name, command.get_short_help_str(limit=100)))
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGone from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line. Exits with its code; returns that when not `standalone_mode`."""
        words = sys.argv[1:] if args is None else list(args)
        # Until the command's options are parsed, and for the error when they can't be.
        found = Settings(format=_format_before_parsing(words))
        run = super().main
        code = _told(lambda: run(args, "atoll", complete_var, standalone_mode=False, obj=found, **extra), found)
        if standalone_mode:
            sys.exit(code)
        return code


def _format_before_parsing(words: Sequence[str]) -> Format:
    before = list(takewhile(lambda word: word != "--", words))
    return "json" if "--format=json" in before or ("--format", "json") in pairwise(before) else "table"


def _suggestion(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, [*_MODULES, *ALIASES], n=2)
    return f". Did you mean {' or '.join(repr(ALIASES.get(each, each)) for each in near)}?" if near else ""


def _told(run: Callable[[], Any], found: Settings) -> int:
    """What a command returned as its exit code, or that of its failure, which is told."""
    try:
        result = run()
        # Here, and not at the interpreter's end, a full disk or a closed pipe can still be told.
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except SystemExit:
        raise
    except BaseException as error:
        return handled(error, found)


EPILOG = """\b
Examples:
  atoll image build tiny                         make a small Linux image, in seconds
  atoll run tiny --name web -p 8080:80           create, start, wait until it answers
  atoll exec web -- uname -a                     run a command in it
  atoll shell web                                a terminal in it
  atoll ls                                       what there is
  atoll rm --force web                           stop it and remove it
"""


ABOUT_THIS_COMPUTER = ("serve", "token", "host", "doctor", "completion", "version")
"""They ignore ATOLL_HOST, and refuse -H."""


@click.group(
    cls=Root,
    name="atoll",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, "--version", message="atoll %(version)s")
@click.option(
    "--host", "-H", metavar="HOST", envvar="ATOLL_HOST", help="Another computer: one of `atoll host ls`, or https://…."
)
@click.pass_context
def cli(ctx: click.Context, host: str | None) -> None:
    """Run many operating systems side by side.

    A VM is named by its name, its id, or the beginning of either. `atoll COMMAND --help` has examples.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 already exists, 5 wrong state, 6 busy, 7 unsupported,
    8 timed out, 9 stuck, 130 cancelled. `exec` and `run -- CMD` end with the command's own code, with 125 if Atoll
    itself failed.
    """
    ctx.ensure_object(Settings).host = host or None
    given = ctx.get_parameter_source("host") is click.core.ParameterSource.COMMANDLINE
    if given and ctx.invoked_subcommand in ABOUT_THIS_COMPUTER:
        raise InvalidInput(
            f"`atoll {ctx.invoked_subcommand}` is about this computer", next_step="Leave -H out, or run it over there."
        )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A file name or a serial line may have bytes that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """The entry point.

    Taking the interpreter apart takes 12 ms of every command, and there is nothing left to do: all output is flushed,
    and what has to be closed was closed where it was opened.
    """
    code = cli.main(standalone_mode=False)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
