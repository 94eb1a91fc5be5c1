"""`doctor` and `version`: about this computer and this Atoll."""

import asyncio
import platform

import click

import atoll
from atoll.cli.failures import Format
from atoll.cli.output import cells, emit, format_option

_SIGNS = {"ok": "ok", "warning": "warn", "failed": "FAIL"}


@click.command("doctor")
@format_option
def doctor_command(format: Format) -> int:
    """Check this computer: what was found, what a lack means, and the command that mends it.

    Ends with 1 if something keeps VMs from running.

    \b
    Example:
      atoll doctor
    """
    from atoll.platform.local import connect_local

    # The host isn't opened: damaged records are something to tell, not to fail by.
    checks = asyncio.run(connect_local().doctor())
    code = int(any(check.ok == "failed" for check in checks))
    if format != "table":
        emit(checks, format)
        return code
    width = max(cells(check.name) for check in checks)
    for check in checks:
        click.echo(f"{_SIGNS[check.ok]:5} {check.name:{width}}  {check.found}")
        for line in (check.meaning, f"Mend it: {check.remedy}" if check.remedy else ""):
            if line:
                click.echo(f"{'':5} {'':{width}}  {line}")
    return code


@click.command("version")
@format_option
def version_command(format: Format) -> None:
    """Print the versions of Atoll, Python and the system.

    \b
    Example:
      atoll version
    """
    found = {"atoll": atoll.__version__, "python": platform.python_version(), "system": platform.platform()}
    if format != "table":
        emit(found, format)
        return
    click.echo(f"atoll {found['atoll']} (Python {found['python']}, {found['system']})")
