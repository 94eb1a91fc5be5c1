"""The agent's way in from elsewhere: TLS with a certificate of its own authority, which it renews while it runs."""

import asyncio
import contextlib
import ipaddress
import json
import re
import socket
import ssl
import struct
import sys
import time
from asyncio import constants, sslproto
from collections.abc import Iterator, Sequence

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from atoll.errors import AtollError, InvalidInput, NetworkFailed
from atoll.host import certificates, files, process
from atoll.host.certificates import SERVER_LIFETIME, Authority
from atoll.layout import Layout

LONGEST_LOOK = 3600.0
"""Seconds between two looks at the certificate and at the addresses that it has to name."""
_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.%\w]+)\]|(?P<v4>[^\[\]:]*)):(?P<port>\d{1,5})")


RECORD = 16 << 10
"""Bytes of the longest record of TLS."""
HANDSHAKE_TIMEOUT = 15.0
_PEER = struct.Struct("iII")
"""What Linux tells of the process at the other end of a Unix socket: its id, user and group."""


def spare() -> None:
    """Of each connection asyncio keeps 256 KiB, and waits a minute for its handshake: for strangers, that is much."""
    sslproto.SSLProtocol.max_size = RECORD
    constants.SSL_HANDSHAKE_TIMEOUT = HANDSHAKE_TIMEOUT


class Identity:
    """The agent's certificate, for as many listeners as it has."""

    def __init__(self, layout: Layout, names: Sequence[str], *, lifetime: float = SERVER_LIFETIME) -> None:
        for each in names:
            if not certificates.is_name(each):
                raise InvalidInput(f"{each!r} can't be the name of a computer", next_step="Write it as DNS has it.")
        self._path = layout.server_certificate
        self._given = tuple(names)
        self._lifetime = lifetime
        files.make_folder(layout.credentials)
        self.authority: Authority = certificates.authority(layout.credentials)
        self.context = _context(self.authority)

    async def refresh(self) -> None:
        """Make a certificate if there is none, it soon ends, or it lacks a name. New connections get it."""
        names = await self._names()
        kept = self._path.read_bytes() if self._path.exists() else b""
        if not certificates.is_good(kept, issuer=self.authority, names=names, now=time.time()):
            made = certificates.server_certificate(self.authority, names, lifetime=self._lifetime)
            files.write_atomically(self._path, made)
        self.context.load_cert_chain(self._path)

    async def keep_good(self) -> None:
        """Look again and again, for ever."""
        while True:
            await asyncio.sleep(min(self._lifetime / 10, LONGEST_LOOK))
            try:
                await self.refresh()
            except (AtollError, OSError) as error:
                sys.stderr.write(f"the certificate can't be renewed: {error}\n")

    async def _names(self) -> list[str]:
        """The first is the certificate's own."""
        found = [*self._given, socket.gethostname(), "localhost", *await _addresses()]
        return list(dict.fromkeys(each for each in found if certificates.is_name(each)))


def _context(authority: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # A client may show a certificate instead of a token; one that isn't of our own authority is refused here.
    context.load_verify_locations(cadata=authority.pem.decode())
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


async def _addresses() -> list[str]:
    """Those of this computer, and of its interfaces as they are now."""
    found = ["127.0.0.1", "::1"]
    with contextlib.suppress(AtollError, ValueError, KeyError):
        listed = json.loads((await process.run(["ip", "-json", "address", "show"])).stdout)
        every = [each["local"] for link in listed for each in link.get("addr_info", []) if "local" in each]
        found += [each for each in every if not ipaddress.ip_address(each).is_link_local]
    return found


def parse_address(text: str) -> tuple[str, int]:
    """Address and port of `192.0.2.1:8443`, `[::]:8443` or `:8443` (all addresses). Raises `InvalidInput`."""
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise InvalidInput(
            f"{text!r} can't be listened on", next_step="Write it as ADDRESS:PORT, such as 0.0.0.0:8443 or [::]:8443."
        )
    everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    return found["v6"] or found["v4"] or everywhere, int(found["port"])


@contextlib.contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """A socket that listens there. Raises `InvalidInput`, `NetworkFailed`."""
    host, port = parse_address(address)
    try:
        server = _bound(host, port)
    except OSError as error:
        raise NetworkFailed(
            f"the agent can't listen on {address}",
            error.strerror or str(error),
            "Choose an address of this computer, and a port that is free.",
        ) from error
    with server:
        yield server


def _bound(host: str, port: int) -> socket.socket:
    family, kind, number, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    server = socket.socket(family, kind, number)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(where)
        server.listen(1024)
    except BaseException:
        server.close()
        raise
    return server


def shown(server: socket.socket) -> str:
    """Its URL."""
    host, port = server.getsockname()[:2]
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's protocol, whose requests and WebSockets have in their state who is at the other end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        found = {"certificate": transport.get_extra_info("peercert")}
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family == socket.AF_UNIX:
            told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            process_id, user, _ = _PEER.unpack(told)
            found["address"] = f"user {user}, process {process_id}"
        self.app_state = {**self.app_state, **found}
