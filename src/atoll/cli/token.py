"""`token`: who may use this computer's agent from elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format
from atoll.cli.options import DURATION
from atoll.cli.output import age, emit, format_option, moment, print_table
from atoll.model.token import SCOPES, Scope

if TYPE_CHECKING:
    from atoll.layout import Layout
    from atoll.model.token import Token
    from atoll.store.tokens import Tokens

_scope = click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="operate",
    show_default=True,
    help="read: look; operate: work with VMs; admin: also what reaches into this computer.",
)


@click.group("token")
def token_command() -> None:
    """Tokens for those who use this computer's VMs from elsewhere.

    \b
    Example:
      atoll token join
    """


def _opened() -> "tuple[Layout, Tokens]":
    from atoll import layout
    from atoll.store.tokens import Tokens

    found = layout.find()
    return found, Tokens(found.tokens)


@token_command.command("create")
@click.argument("name")
@_scope
@click.option("--expires", type=DURATION, metavar="TIME", help="How long it is good, such as 30d; else for ever.")
@click.option(
    "--certificate",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a client's certificate with its key as well, which is as good as the token.",
)
@format_option
def create(name: str, scope: Scope, expires: float | None, certificate: Path | None, format: Format) -> None:
    """Make a token, and print its secret: this once, since only a digest is kept.

    \b
    Examples:
      atoll token create ci --scope operate --expires 30d
      atoll token create dashboard --scope read
    """
    found, tokens = _opened()
    token, secret = tokens.create(name, scope=scope, expires_in=expires)
    if certificate is not None:
        try:
            _write_certificate(found, token, certificate)
        except BaseException:
            tokens.rm(name)
            raise
    if format != "table":
        emit({"name": name, "scope": scope, "expires_at": token.expires_at, "token": secret}, format)
        return
    click.echo(secret)


def _write_certificate(layout: "Layout", token: "Token", path: Path) -> None:
    import time

    from atoll.host import certificates, files

    lifetime = certificates.CLIENT_LIFETIME if token.expires_at is None else token.expires_at - time.time()
    issuer = certificates.authority(layout.credentials)
    files.write_atomically(path, certificates.client_certificate(issuer, token.name, token.id, lifetime=lifetime))


@token_command.command("join")
@_scope
@click.option("--expires", type=DURATION, default="1h", show_default=True, metavar="TIME", help="How long it waits.")
@format_option
def join(scope: Scope, expires: float, format: Format) -> None:
    """Print a token that lets one other computer in: it is exchanged, once, for one that lasts.

    It has the fingerprint of this computer's certificate authority in it, so who joins knows whom he speaks to.

    \b
    Examples:
      atoll token join
      atoll token join --scope admin --expires 10m
    """
    from atoll.host import certificates

    found, tokens = _opened()
    fingerprint = certificates.authority(found.credentials).fingerprint
    token, shown = tokens.create_join(scope=scope, expires_in=expires, fingerprint=fingerprint)
    if format != "table":
        emit({"scope": scope, "expires_at": token.expires_at, "token": shown}, format)
        return
    click.echo(shown)


@token_command.command("ls")
@format_option
def ls(format: Format) -> None:
    """List the tokens; their secrets are kept nowhere.

    \b
    Example:
      atoll token ls
    """
    found = _opened()[1].ls()
    if format != "table":
        emit(found, format)
        return
    rows = [
        (
            each.name,
            each.scope,
            age(each.created_at),
            ("expired " if each.expired else "") + moment(each.expires_at) if each.expires_at else "never",
            "to join" if each.joins else age(each.last_used_at) if each.last_used_at else "never",
        )
        for each in found
    ]
    print_table(("NAME", "SCOPE", "CREATED", "EXPIRES", "USED"), rows)


@token_command.command("rm")
@click.argument("names", nargs=-1, required=True)
def rm(names: tuple[str, ...]) -> None:
    """Revoke tokens: at once, also where they are in use.

    \b
    Example:
      atoll token rm ci
    """
    tokens = _opened()[1]
    for each in names:
        tokens.rm(each)
