"""The agent's own authority and certificate: who may read them, what they are for, and how they are renewed."""

import asyncio
import ssl
from pathlib import Path

import pytest

from atoll.agent.tls import Identity, parse_address
from atoll.errors import InvalidInput, StorageFailed
from atoll.host import certificates
from atoll.layout import Layout


def test_the_authority_is_made_once_for_its_user_only(tmp_path: Path) -> None:
    made = certificates.authority(tmp_path / "agent")
    assert certificates.authority(tmp_path / "agent").fingerprint == made.fingerprint
    assert certificates.fingerprint_of((tmp_path / "agent" / "ca.pem").read_bytes()) == made.fingerprint
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "agent").iterdir()} == {0o600}
    assert (tmp_path / "agent").stat().st_mode & 0o777 == 0o700


def test_a_damaged_authority_is_not_replaced(tmp_path: Path) -> None:
    certificates.authority(tmp_path)
    (tmp_path / "ca-key.pem").write_text("what is this")
    with pytest.raises(StorageFailed, match="can't be used"):
        certificates.authority(tmp_path)
    assert (tmp_path / "ca-key.pem").read_text() == "what is this"


def test_a_certificate_is_replaced_when_it_ends_soon_or_lacks_a_name(tmp_path: Path) -> None:
    authority = certificates.authority(tmp_path / "one")
    made = certificates.server_certificate(authority, ["web", "10.0.0.1", "::1"], lifetime=900)

    def is_good(*names: str, issuer: certificates.Authority = authority, at: float = 0) -> bool:
        import time

        return certificates.is_good(made, issuer=issuer, names=names, now=time.time() + at)

    assert certificates.names_in(made) == ["web", "10.0.0.1", "::1"]
    assert is_good("web", "::1")
    assert is_good("web", at=590)
    assert not is_good("web", at=610)
    assert not is_good("web", "10.0.0.2")
    assert not is_good("web", issuer=certificates.authority(tmp_path / "two"))
    assert not certificates.is_good(b"", issuer=authority, names=[], now=0)


async def test_new_connections_get_the_renewed_certificate(layout: Layout) -> None:
    identity = Identity(layout, ["vms.test"], lifetime=3.0)
    await identity.refresh()
    renewing = asyncio.create_task(identity.keep_good())
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", ssl=identity.context)
    port = server.sockets[0].getsockname()[1]
    client = ssl.create_default_context(cafile=str(layout.credentials / "ca.pem"))

    async def serial_number() -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="vms.test")
        found = writer.get_extra_info("peercert")["serialNumber"]
        writer.close()
        return str(found)

    # Each connection is verified, so each came before the end of the certificate that it got.
    seen = set()
    async with server, asyncio.timeout(30):
        while len(seen) < 3:
            seen.add(await serial_number())
            await asyncio.sleep(0.1)
    renewing.cancel()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("192.0.2.1:8443", ("192.0.2.1", 8443)),
        ("[::1]:443", ("::1", 443)),
        (":8443", ("::", 8443)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_addresses_are_read(text: str, found: tuple[str, int]) -> None:
    assert parse_address(text) == found


@pytest.mark.parametrize("text", ["", "8443", "1.2.3.4", "::1:443", "host:99999", "host:port"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="ADDRESS:PORT"):
        parse_address(text)
