"""Connections to other computers: whom one trusts, and what it means when a connection can't be had or ends."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from atoll.errors import InvalidInput, NetworkFailed, from_os_error

R = TypeVar("R")
RECONNECT = 20.0
"""Seconds in which a connection that was lost may come back."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_OTHER_NAME = (62, 64)
_NOT_NOW = (9, 10)
"""OpenSSL's codes (X509_V_ERR_…): a certificate for other names or addresses, one that isn't good yet or any more."""


class Unreachable(NetworkFailed):
    """Nobody answers there; nothing was asked."""


class ConnectionLost(NetworkFailed):
    """A connection ended in the middle: what was asked may have been done, or not."""


def tls_context(ca: str | Path | None) -> ssl.SSLContext:
    """What verifies an agent: by its own authority (PEM, or a file with it), else by those that the system trusts.

    Raises `InvalidInput`, `StorageFailed`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is None:
        context.load_default_certs()
        return context
    if isinstance(ca, str) and ca.lstrip().startswith("-----BEGIN"):
        text = ca
    else:
        try:
            text = Path(ca).read_text()
        except OSError as error:
            raise from_os_error(error, f"read {ca}") from error
    try:
        context.load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInput("that is no certificate authority", str(error), "Give a PEM file, as /v1/ca.pem.") from error
    return context


def unverified() -> ssl.SSLContext:
    """For the one question whose answer is checked otherwise: by a fingerprint."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def why_not(shown: str, error: BaseException) -> NetworkFailed:
    """A connection that wasn't had, as the user should read it."""
    refused = _in_chain(error, ssl.SSLCertVerificationError)
    if refused is not None:
        return _mistrusted(shown, refused)
    handshake = _in_chain(error, ssl.SSLError)
    if handshake is not None:
        return NetworkFailed(
            f"the agent at {shown} can't be spoken to over TLS",
            str(handshake),
            "See whether `atoll serve` runs there, at this port.",
        )
    return Unreachable(
        f"the agent at {shown} can't be reached",
        str(error) or type(error).__name__,
        "See whether `atoll serve` runs there, and whether the address is right.",
    )


def _mistrusted(shown: str, error: ssl.SSLCertVerificationError) -> NetworkFailed:
    why = error.verify_message
    if error.verify_code in _OTHER_NAME:
        next_step = "Use a name that the certificate has, or serve with `--name NAME` over there."
    elif error.verify_code in _NOT_NOW:
        next_step = "Compare the clocks of both computers; an agent that runs renews its certificate by itself."
    else:
        next_step = (
            "Somebody may be in between. If it was set up anew, `atoll host rm` it, and add it with a new join token."
        )
    return NetworkFailed(f"the certificate of {shown} isn't trusted", why, next_step)


def _in_chain(error: BaseException | None, kind: type[R]) -> R | None:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def lost(shown: str, error: BaseException) -> ConnectionLost:
    return ConnectionLost(
        f"the connection to the agent at {shown} was lost",
        str(error) or type(error).__name__,
        "See whether `atoll serve` runs there; `atoll operation ls` tells what became of what was at work.",
    )


async def persistently(ask: Callable[[], Awaitable[R]], *, was_lost: bool = False) -> R:
    """Ask; when the connection is lost, ask again until it is back, for some seconds. For what may be asked twice."""
    if not was_lost:
        try:
            return await ask()
        except ConnectionLost:
            pass
    end, pause = asyncio.get_running_loop().time() + RECONNECT, _FIRST_PAUSE
    while True:
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        try:
            return await ask()
        except (ConnectionLost, Unreachable):
            if asyncio.get_running_loop().time() > end:
                raise


def keep_alive_options() -> list[Any]:
    """So that an end that has vanished is noticed, also where nothing is said for long."""
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
    found = [(getattr(socket, name), value) for name, value in wanted.items() if hasattr(socket, name)]
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *((socket.IPPROTO_TCP, option, value) for option, value in found),
    ]
