"""`host`: other computers, which -H names then."""

import asyncio
import sys
from pathlib import Path

import click

from atoll.cli.failures import Format, note
from atoll.cli.output import age, emit, format_option, moment, print_description, print_table
from atoll.errors import AtollError, InvalidInput
from atoll.model.token import WhoAmI


@click.group("host")
def host_command() -> None:
    """Note other computers where `atoll serve --listen` runs; `-H NAME` before any command means one of them.

    \b
    Examples:
      atoll host add big https://big.example.org:8443 atoll-join.…
      atoll -H big ls
    """


@host_command.command("add")
@click.argument("name")
@click.argument("url")
@click.argument("join", required=False)
@click.option("--token-stdin", is_flag=True, help="Read a lasting token from standard input instead.")
@click.option("--fingerprint", metavar="SHA256", help="With that: of the other side's certificate authority.")
@click.option(
    "--ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With that: the certificate of that authority. Without either, those that the system trusts count.",
)
@format_option
def add(
    name: str,
    url: str,
    join: str | None,
    token_stdin: bool,
    fingerprint: str | None,
    ca: Path | None,
    format: Format,
) -> None:
    """Note another computer, by the join token that `atoll token join` printed over there.

    The token is used up by that: it says whom to trust, and is exchanged for one that lasts, which is kept here.

    \b
    Examples:
      atoll host add big https://big.example.org:8443 atoll-join.0f…
      atoll host add big https://big.example.org:8443 --token-stdin --ca ca.pem <token
    """
    from atoll.platform import known_hosts

    if (join is None) != token_stdin:
        raise InvalidInput("what opens the host is missing", next_step="Give a join token, or --token-stdin.")
    if join is not None and (fingerprint or ca):
        raise InvalidInput("a join token says itself whom to trust", next_step="Leave --ca and --fingerprint out.")
    if join is not None:
        found = asyncio.run(known_hosts.join(name, url, known_hosts.parse_invitation(join)))
    else:
        token, text = sys.stdin.readline().strip(), ca.read_text() if ca is not None else None
        found = asyncio.run(known_hosts.add(name, url, token, ca=text, fingerprint=fingerprint))
    if format != "table":
        emit(found, format)
        return
    click.echo(f"{name} knows this user as {found.name}, with the scope {found.scope}")


@host_command.command("ls")
@format_option
def ls(format: Format) -> None:
    """List the other computers that are noted.

    \b
    Example:
      atoll host ls
    """
    from atoll.platform import known_hosts

    found = [known_hosts.shown(each) for each in known_hosts.known()]
    if format != "table":
        emit(found, format)
        return
    print_table(("NAME", "URL", "ADDED"), [(each.name, each.url, age(each.added_at)) for each in found])


@host_command.command("show")
@click.argument("name")
@format_option
def show(name: str, format: Format) -> int:
    """Show one, and what it takes this user for. Ends with 1 when it doesn't let him in.

    \b
    Example:
      atoll host show big
    """
    from atoll.platform import known_hosts

    host = known_hosts.get(name)
    answer: WhoAmI | AtollError
    try:
        answer = asyncio.run(known_hosts.whoami(host))
    except AtollError as error:
        answer = error
    refused = answer.text if isinstance(answer, AtollError) else None
    if format != "table":
        told = None if isinstance(answer, AtollError) else answer
        emit({"host": known_hosts.shown(host), "whoami": told, "error": refused}, format)
        return int(refused is not None)
    rows = [("name", host.name), ("url", host.url), ("authority", host.fingerprint or "those of the system")]
    if isinstance(answer, WhoAmI):
        until = "" if answer.expires_at is None else f", until {moment(answer.expires_at)}"
        rows += [("known as", f"{answer.name} ({answer.scope}{until})"), ("version", answer.version)]
    print_description([*rows, ("added", age(host.added_at)), *([("error", refused)] if refused else [])])
    return int(refused is not None)


@host_command.command("rm")
@click.argument("names", nargs=-1, required=True)
def rm(names: tuple[str, ...]) -> None:
    """Forget other computers. The tokens for them stay good over there, until `atoll token rm` there.

    \b
    Example:
      atoll host rm big
    """
    from atoll.platform import known_hosts

    for each in names:
        gone = known_hosts.rm(each)
        note(f"its token is still good at {gone.url}: `atoll token ls`, over there, has it")
