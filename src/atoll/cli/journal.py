"""`events` and `operation`: what happened, and what is at work."""

import json
from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format
from atoll.cli.output import age, emit, emit_line, format_option, moment, print_description, print_table
from atoll.model.operation import Operation
from atoll.model.vm import Event

if TYPE_CHECKING:
    from atoll.platform.api import AsyncHost


@click.command("events")
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on.")
@click.option("--after", type=int, metavar="ID", help="Only what came after this event.")
@format_option
def events_command(follow: bool, after: int | None, format: Format) -> None:
    """Print what happened to VMs, images and operations. JSON is one event a line.

    \b
    Examples:
      atoll events
      atoll events --follow --format json
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        async for event in host.events(follow=follow, after=after):
            if format == "json":
                emit_line(event)
            elif format == "yaml":
                emit([event], format)
            else:
                click.echo(_line(event))

    perform(action, cancelled="")


def _line(event: Event) -> str:
    from atoll.cli.failures import printable

    data = " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in event.data.items()
    )
    return printable(" ".join(part for part in (moment(event.at), event.kind, event.name, data) if part))


@click.group("operation")
def operation_command() -> None:
    """Look at the journal of operations; undo or finish one that is stuck.

    \b
    Example:
      atoll operation ls
    """


@operation_command.command("ls")
@click.option("--unfinished", "-u", is_flag=True, help="Only those at work, or stuck.")
@format_option
def ls(unfinished: bool, format: Format) -> None:
    """List operations, the latest last.

    \b
    Example:
      atoll operation ls --unfinished
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> list[Operation]:
        return await host.operations.ls(unfinished=unfinished)

    found = sorted(perform(action, cancelled=""), key=lambda each: each.created_at)
    if format != "table":
        emit(found, format)
        return
    rows = [
        (each.id[:12], each.verb, each.subject_name, each.state, age(each.created_at), each.error or "-")
        for each in found
    ]
    print_table(("ID", "VERB", "OF", "STATE", "BEGAN", "ERROR"), rows)


@operation_command.command("show")
@click.argument("operation")
@format_option
def show(operation: str, format: Format) -> None:
    """Tell how far an operation came.

    \b
    Example:
      atoll operation show 3f2a
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Operation:
        return await host.operations.show(operation)

    _print(perform(action, cancelled=""), format)


@operation_command.command("cancel")
@click.argument("operation")
@format_option
def cancel(operation: str, format: Format) -> None:
    """Undo an operation that is at work or stuck.

    \b
    Example:
      atoll operation cancel 3f2a
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Operation:
        return await host.operations.cancel(operation)

    _print(perform(action), format)


@operation_command.command("retry")
@click.argument("operation")
@format_option
def retry(operation: str, format: Format) -> None:
    """Go on with an operation that is stuck.

    \b
    Example:
      atoll operation retry 3f2a
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> Operation:
        return await host.operations.retry(operation)

    _print(perform(action), format)


def _print(operation: Operation, format: Format) -> None:
    if format != "table":
        emit(operation, format)
        return
    steps = "\n".join(
        f"{step.name}: {step.state}{f' ({step.error})' if step.error else ''}" for step in operation.steps
    )
    pairs = [
        ("Id", operation.id),
        ("Verb", operation.verb),
        ("Of", operation.subject_name),
        ("State", operation.state),
        ("Began", moment(operation.created_at)),
        ("Ended", moment(operation.finished_at) if operation.finished_at else ""),
        ("Error", operation.error),
        ("Steps", steps),
    ]
    print_description([pair for pair in pairs if pair[1]])
