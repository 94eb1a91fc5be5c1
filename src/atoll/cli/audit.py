"""`audit`: who asked a computer's agent for what."""

from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format
from atoll.cli.output import emit, emit_line, format_option, moment

if TYPE_CHECKING:
    from atoll.model.audit import AuditEntry
    from atoll.platform.api import AsyncHost


@click.command("audit")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is asked from now on.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N.")
@format_option
def audit_command(follow: bool, tail: int | None, format: Format) -> None:
    """Print who asked the agent for changes, and who was refused. JSON is one entry a line.

    \b
    Examples:
      atoll audit --tail 20
      atoll audit --follow --format json
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> None:
        async for entry in host.audit(follow=follow, tail=tail):
            if format == "json":
                emit_line(entry)
            elif format == "yaml":
                emit([entry], format)
            else:
                click.echo(_line(entry))

    perform(action, cancelled="")


def _line(entry: "AuditEntry") -> str:
    from atoll.cli.failures import printable

    parts = (moment(entry.at), str(entry.status), entry.principal, entry.address, entry.call, entry.subject)
    return printable("  ".join(part for part in (*parts, entry.why) if part))
