"""`serve --install` and `--uninstall`: the systemd units."""

import click
from click.core import ParameterSource

from atoll.agent import units
from atoll.cli.failures import note

_OWN = ("install", "uninstall", "user")


def install(ctx: click.Context, *, user: bool) -> None:
    """Write the units, with the options that this command line has besides; tell what to run."""
    where = units.place(user=user)
    for path in units.install(where, options_of(ctx)):
        note(f"wrote {path}")
    note("now let systemd read them, and start the agent at each boot:")
    click.echo(f"{where.systemctl} daemon-reload")
    click.echo(f"{where.systemctl} enable --now {units.AGENT} {units.VMS}")
    if where.user:
        note("your VMs end with your last session unless you may linger:")
        click.echo("loginctl enable-linger")


def uninstall(*, user: bool) -> None:
    where = units.place(user=user)
    removed = units.uninstall(where)
    if not removed:
        note(f"there are no units of Atoll's in {where.folder}.")
        return
    for path in removed:
        note(f"removed {path}")
    note("VMs run on. Now end the agent, and let systemd read what there is:")
    click.echo(f"{where.systemctl} stop {units.AGENT}")
    click.echo(f"{where.systemctl} daemon-reload")


def options_of(ctx: click.Context) -> list[str]:
    """The other options, as they were given."""
    words = []
    for each in ctx.command.params:
        if each.name in _OWN or ctx.get_parameter_source(str(each.name)) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[str(each.name)]
        for one in value if isinstance(value, tuple) else (value,):
            words += [each.opts[0]] if one is True else [each.opts[0], str(one)]
    return words
