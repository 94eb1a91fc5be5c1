"""The other computers that this user has noted: a file of his own, written as a whole."""

import getpass
import hmac
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from atoll import layout
from atoll.errors import AlreadyExists, InvalidInput, NetworkFailed, NotFound, RecordsFailed, from_os_error
from atoll.host import files
from atoll.model.remote import KnownHost, KnownHostInfo
from atoll.model.token import Joined, JoinRequest, WhoAmI
from atoll.platform import routes
from atoll.platform.reach import tls_context, unverified
from atoll.platform.wire import Place, Wire, decoded

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
_decoder = msgspec.json.Decoder(list[KnownHost])


def known() -> list[KnownHost]:
    """All of them. Raises `RecordsFailed`, `StorageFailed`."""
    path = layout.find_remotes()
    try:
        return _decoder.decode(path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    except msgspec.DecodeError as error:
        raise RecordsFailed(f"{path} can't be read", str(error), "Mend it, or remove it and add them anew.") from error


def get(name: str) -> KnownHost:
    """Raises `NotFound`."""
    for each in known():
        if each.name == name:
            return each
    raise NotFound(f"there is no host {name!r}", next_step="`atoll host ls` lists them; `atoll host add` adds one.")


def shown(host: KnownHost) -> KnownHostInfo:
    return KnownHostInfo(name=host.name, url=host.url, fingerprint=host.fingerprint, added_at=host.added_at)


def place_of(host: KnownHost) -> Place:
    return Place(url=host.url, token=host.token, tls=tls_context(host.ca))


def rm(name: str) -> KnownHost:
    """Forget it. Raises `NotFound`."""
    gone = get(name)
    _change(lambda hosts: (each for each in hosts if each.name != name))
    return gone


def _change(change: Callable[[list[KnownHost]], Iterable[KnownHost]]) -> None:
    path = layout.find_remotes()
    files.make_folder(path.parent)
    with files.locked(path.with_suffix(".lock")):
        kept = sorted(change(known()), key=lambda each: each.name)
        files.write_atomically(path, msgspec.json.format(msgspec.json.encode(kept)))


def check_url(url: str) -> str:
    """The URL of an agent, or `InvalidInput`."""
    try:
        parts = urlsplit(url)
        good = parts.scheme == "https" and bool(parts.hostname) and parts.path in ("", "/") and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise InvalidInput(f"{url!r} can't be a host", next_step="Write it as https://NAME:PORT.")
    return url.rstrip("/")


class Invitation(NamedTuple):
    """What a join token says."""

    secret: str
    fingerprint: str


def parse_invitation(text: str) -> Invitation:
    """Raises `InvalidInput`."""
    secret, _, fingerprint = text.strip().rpartition(".")
    if not secret.startswith("atoll-join.") or not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise InvalidInput(
            "that is no join token", next_step="Make one over there with `atoll token join`, and copy all of it."
        )
    return Invitation(secret, fingerprint)


async def join(name: str, url: str, invitation: Invitation) -> WhoAmI:
    """Note a host, with the token that it gives for a one-time one. Raises what keeps it from that; nothing is noted
    then.
    """
    address = _new(name, url)
    ca = await fetch_authority(address, invitation.fingerprint)
    wire = Wire(Place(url=address, tls=tls_context(ca)))
    asked = JoinRequest(secret=invitation.secret, name=_own_name())
    try:
        path = f"{routes.VERSION}/join"
        async with wire.request("POST", path, content=msgspec.json.encode(asked)) as response:
            joined: Joined = decoded(await response.aread(), Joined)
    finally:
        await wire.close()
    return await _note(name, address, joined.token, ca=ca)


async def add(name: str, url: str, token: str, *, ca: str | None, fingerprint: str | None) -> WhoAmI:
    """Note a host whose token is here already. Raises what keeps it from being used; nothing is noted then."""
    address = _new(name, url)
    if fingerprint is not None:
        ca = await fetch_authority(address, fingerprint.lower().replace(":", ""))
    return await _note(name, address, token, ca=ca)


def _new(name: str, url: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} can't be the name of a host", "letters, digits, '.', '_' and '-' can be in it")
    if any(each.name == name for each in known()):
        raise AlreadyExists(
            f"there is a host '{name}' already", next_step=f"Choose another name, or `atoll host rm {name}`."
        )
    return check_url(url)


async def _note(name: str, url: str, token: str, *, ca: str | None) -> WhoAmI:
    """Keep it, once it let us in."""
    fingerprint = _fingerprint_of(ca) if ca is not None else ""
    host = KnownHost(name=name, url=url, token=token, ca=ca, fingerprint=fingerprint, added_at=time.time())
    found = await whoami(host)
    _change(lambda hosts: [*(each for each in hosts if each.name != name), host])
    return found


async def whoami(host: KnownHost) -> WhoAmI:
    """What the host takes us for. Raises why we can't get in."""
    wire = Wire(place_of(host))
    try:
        return await wire.get(f"{routes.VERSION}/whoami", WhoAmI)  # type: ignore[no-any-return]
    finally:
        await wire.close()


async def fetch_authority(url: str, fingerprint: str) -> str:
    """The certificate of a host's authority. Raises `NetworkFailed` when it isn't the one of this fingerprint."""
    wire = Wire(Place(url=url, tls=unverified()))
    try:
        async with wire.request("GET", f"{routes.VERSION}/ca.pem") as response:
            pem = (await response.aread()).decode(errors="replace")
    finally:
        await wire.close()
    if not hmac.compare_digest(_fingerprint_of(pem), fingerprint):
        raise NetworkFailed(
            f"{url} isn't the host that the token is for",
            "its certificate authority has another fingerprint",
            "Look at the address; if it is right, somebody is in between.",
        )
    return pem


def _fingerprint_of(pem: str) -> str:
    import hashlib
    import ssl

    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip())).hexdigest()
    except ValueError:
        return ""


def _own_name() -> str:
    """Who this is, as the other side's list of tokens shall name him."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    return re.sub(r"[^A-Za-z0-9_.@-]", "-", f"{user}@{os.uname().nodename}").lstrip("-._@")[:50] or "somebody"
