"""Other computers: joined once, pinned, named with -H, and told apart from those in between."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.helpers.agents import remote_agent
from tests.helpers.command import Ended, atoll

import atoll as sdk
from atoll import layout as layouts
from atoll.errors import InvalidInput, NetworkFailed, NotFound, Unauthorized
from atoll.host import certificates
from atoll.layout import Layout
from atoll.store.tokens import Tokens


async def run(*words: str, stdin: bytes = b"") -> Ended:
    """A command, while the agent's log goes on."""
    return await asyncio.to_thread(atoll, *words, stdin=stdin)


@pytest.fixture
async def url(layout: Layout) -> AsyncIterator[str]:
    async with remote_agent(layout) as found:
        yield found


async def invitation(*words: str) -> str:
    return (await run("token", "join", *words)).out.strip()


async def test_a_host_is_joined_and_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    added = await run("host", "add", "big", url, await invitation("--scope", "admin"))
    assert added.code == 0 and "with the scope admin" in added.out
    kept = layouts.find_remotes()
    assert kept.stat().st_mode & 0o777 == 0o600

    assert (await run("-H", "big", "ls", "--format", "json")).out.strip() == "[]"
    assert [each["name"] for each in json.loads((await run("host", "ls", "--format", "json")).out)] == ["big"]
    assert "(admin)" in (await run("host", "show", "big")).out
    assert kept.read_text().count("atoll.") == 1 and "atoll." not in (await run("host", "ls")).out
    monkeypatch.setenv("ATOLL_HOST", "big")
    assert "whoami" not in (await run("audit")).out
    assert (await run("doctor")).code in (0, 1)

    async with sdk.connect_async("big") as host:
        assert await host.ls() == []
    assert (await run("host", "rm", "big")).code == 0
    assert (await run("ls")).code == NotFound.exit_code


async def test_the_sdk_takes_a_token_and_an_authority(url: str, layout: Layout) -> None:
    _, secret = Tokens(layout.tokens).create("ci", scope="read")
    ca = layout.credentials / "ca.pem"
    for authority in (ca, str(ca), ca.read_text()):
        async with sdk.connect_async(url, token=secret, ca=authority) as host:
            assert await host.ls() == []
    with pytest.raises(NetworkFailed, match="isn't trusted"):
        async with sdk.connect_async(url, token=secret) as host:
            await host.ls()
    with pytest.raises(Unauthorized, match="revoked"):
        async with sdk.connect_async(url, token="atoll.x.y", ca=ca) as host:
            await host.ls()
    with pytest.raises(Unauthorized, match="no token"):
        async with sdk.connect_async(url, ca=ca) as host:
            await host.ls()
    with pytest.raises(InvalidInput):
        sdk.connect_async(token=secret)
    with pytest.raises(InvalidInput, match="https://NAME"):
        sdk.connect_async("http://127.0.0.1", token=secret)


async def test_nothing_is_noted_when_it_cant_be_joined(url: str) -> None:
    good = await invitation()
    secret, _, fingerprint = good.rpartition(".")
    another = f"{secret}.{'0' * 64}"
    for words, said in (
        (("big", url, another), "another fingerprint"),
        (("big", url, "atoll-join.x"), "no join token"),
        (("big", url.replace("https", "http"), good), "https://NAME:PORT"),
        (("big", url.replace("127.0.0.1", "127.0.0.2"), good), "can't be reached"),
        (("b g", url, good), "can't be the name"),
        (("big", url), "--token-stdin"),
        (("big", url, "--token-stdin"), "isn't trusted"),
        (("big", url, "--token-stdin", "--fingerprint", fingerprint), "the token isn't known"),
    ):
        refused = await run("host", "add", *words, stdin=b"atoll.x.y\n")
        assert refused.code != 0 and said in refused.err, refused
    assert not layouts.find_remotes().exists()

    # None of that used it up; the first who comes does.
    assert (await run("host", "add", "big", url, good)).code == 0
    assert "used already" in (await run("host", "add", "more", url, good)).err
    assert "there is a host 'big'" in (await run("host", "add", "big", url, good)).err


async def test_a_lasting_token_is_read_from_standard_input(url: str, layout: Layout) -> None:
    _, secret = Tokens(layout.tokens).create("ci", scope="read")
    ca = str(layout.credentials / "ca.pem")
    added = await run("host", "add", "big", url, "--token-stdin", "--ca", ca, stdin=secret.encode() + b"\n")
    assert added.code == 0, added.err
    assert (await run("-H", "big", "ls")).code == 0
    await run("token", "rm", "ci")
    shown = await run("host", "show", "big", "--format", "json")
    assert shown.code == 1 and "revoked" in json.loads(shown.out)["error"]


async def test_another_computer_at_the_address_isnt_spoken_to(url: str, tmp_path: Path) -> None:
    await run("host", "add", "big", url, await invitation())
    foreign = certificates.authority(tmp_path)
    (tmp_path / "server.pem").write_bytes(certificates.server_certificate(foreign, ["127.0.0.1"]))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "server.pem")
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1))
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        kept = layouts.find_remotes()
        kept.write_text(kept.read_text().replace(url, f"https://127.0.0.1:{port}"))
        refused = await run("-H", "big", "ls")
    assert "isn't trusted" in refused.err and "Somebody may be in between" in refused.err
    assert b"".join(heard) == b""


@pytest.mark.parametrize("words", [("doctor",), ("serve",), ("token", "ls"), ("host", "ls"), ("completion", "bash")])
def test_commands_about_this_computer_say_so(home: Path, words: tuple[str, ...]) -> None:
    refused = atoll("-H", "big", *words)
    assert refused.code == InvalidInput.exit_code
    assert f"`atoll {words[0]}` is about this computer" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--listen", "8443"), "ADDRESS:PORT"),
        (("--listen", "192.0.2.200:8443"), "can't listen on 192.0.2.200:8443"),
        (("--listen", "127.0.0.1:0", "--name", "a b"), "can't be the name of a computer"),
    ],
)
def test_an_agent_that_cant_listen_says_why(layout: Layout, words: tuple[str, ...], said: str) -> None:
    refused = atoll("serve", *words)
    assert refused.code != 0 and said in refused.err
    assert not layout.agent_socket.exists()


def test_a_token_whose_certificate_cant_be_written_isnt_made(layout: Layout) -> None:
    refused = atoll("token", "create", "ci", "--certificate", "/proc/ci.pem")
    assert refused.code != 0 and "/proc/ci.pem" in refused.err
    assert Tokens(layout.tokens).ls() == []
