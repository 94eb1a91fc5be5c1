"""The tokens of an agent: one file, written as a whole, that several processes use.

A token reads `atoll.ID.SECRET`. The one that prints `atoll-join.ID.SECRET.FINGERPRINT` is exchanged for another one,
once, by somebody who sees by the fingerprint whom he speaks to.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from atoll.errors import AlreadyExists, InvalidInput, NotFound, RecordsFailed, Unauthorized, from_os_error
from atoll.host import files
from atoll.model.token import Joined, JoinRequest, Scope, Token, TokenInfo

BEARER, JOIN = "atoll", "atoll-join"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}", re.ASCII)
RESERVED = ("local", "nobody")
"""What the audit log calls those who have no token."""
_KEPT_JOINS = 7 * 86400.0
"""Seconds that a join token is still listed after its end."""
_REFUSED = "Ask for a new one: `atoll token create` on the computer that it is for."
_decoder = msgspec.json.Decoder(list[Token])


class Tokens:
    """Those of one agent. Reading sees at once what another process has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._known: dict[str, Token] = {}

    def all(self) -> dict[str, Token]:
        """By their ids. Raises `RecordsFailed`, `StorageFailed`."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self._seen, self._known = None, {}
            return self._known
        except OSError as error:
            raise from_os_error(error, f"read {self._path}") from error
        seen = (found.st_ino, found.st_mtime_ns, found.st_size)
        if seen != self._seen:
            self._known = {each.id: each for each in self._read()}
            self._seen = seen
        return self._known

    def _read(self) -> list[Token]:
        try:
            return _decoder.decode(self._path.read_bytes())
        except OSError as error:
            raise from_os_error(error, f"read {self._path}") from error
        except msgspec.DecodeError as error:
            raise RecordsFailed(
                f"{self._path} can't be read", str(error), "Put it back from a backup, or remove it: all tokens end."
            ) from error

    def _change(self, change: Callable[[dict[str, Token]], Iterable[Token]]) -> None:
        files.make_folder(self._path.parent)
        with files.locked(self._path.with_suffix(".lock")):
            kept = list(change(dict(self.all())))
            files.write_atomically(self._path, msgspec.json.format(msgspec.json.encode(kept)))

    def ls(self) -> list[TokenInfo]:
        now = time.time()
        return [
            TokenInfo(
                name=each.name,
                scope=each.scope,
                created_at=each.created_at,
                expires_at=each.expires_at,
                last_used_at=each.last_used_at,
                expired=_has_expired(each, now),
                joins=each.kind == "join",
            )
            for each in sorted(self.all().values(), key=lambda each: each.created_at)
        ]

    def create(self, name: str, *, scope: Scope, expires_in: float | None = None) -> tuple[Token, str]:
        """A new one, and what its owner shows. Raises `AlreadyExists`, `InvalidInput`."""
        token, shown = _made(check_name(name), scope, expires_in=expires_in)

        def add(known: dict[str, Token]) -> list[Token]:
            if any(each.name == name for each in known.values()):
                raise AlreadyExists(
                    f"there is a token '{name}' already", next_step=f"Choose another name, or `atoll token rm {name}`."
                )
            return [*known.values(), token]

        self._change(add)
        return token, shown

    def create_join(self, *, scope: Scope, expires_in: float, fingerprint: str) -> tuple[Token, str]:
        """One to be exchanged, and what who joins is given."""
        token, shown = _made(f"join-{secrets.token_hex(3)}", scope, expires_in=expires_in, kind="join")
        now = time.time()
        self._change(lambda known: [*(each for each in known.values() if not _is_stale(each, now)), token])
        return token, f"{shown}.{fingerprint}"

    def join(self, request: JoinRequest) -> Joined:
        """Exchange it. Raises `Unauthorized`, also at the second time."""
        wanted, made = check_name(request.name), []

        def exchange(known: dict[str, Token]) -> list[Token]:
            found = _found(known, request.secret, "join")
            token, shown = _made(_free(wanted, known.values()), found.scope, expires_in=None)
            made.append(Joined(token=shown, name=token.name, scope=token.scope))
            return [*(each for each in known.values() if each.id != found.id), token]

        self._change(exchange)
        return made[0]

    def rm(self, name: str) -> None:
        """Revoke it. Raises `NotFound`."""

        def without(known: dict[str, Token]) -> list[Token]:
            kept = [each for each in known.values() if each.name != name]
            if len(kept) == len(known):
                raise NotFound(f"there is no token {name!r}", next_step="`atoll token ls` lists them.")
            return kept

        self._change(without)

    def of_bearer(self, shown: str) -> Token:
        """Whose it is. Raises `Unauthorized`."""
        return _found(self.all(), shown, "bearer")

    def of_certificate(self, name: str, token_id: str) -> Token:
        """Whose a client's certificate is. Raises `Unauthorized`."""
        found = self.all().get(token_id)
        if found is None or found.name != name:
            raise Unauthorized(f"the token '{name}' of this certificate was revoked", next_step=_REFUSED)
        return _good(found)

    def is_good(self, token_id: str) -> bool:
        """Whether it is neither revoked nor expired by now."""
        found = self.all().get(token_id)
        return found is not None and not _has_expired(found, time.time())

    def note_uses(self, used: dict[str, float]) -> None:
        """Remember when they were last used."""
        self._change(
            lambda known: [
                replace(each, last_used_at=max(used.get(each.id, 0.0), each.last_used_at or 0.0) or None)
                for each in known.values()
            ]
        )


def check_name(name: str) -> str:
    """The name itself, or `InvalidInput`."""
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise InvalidInput(
            f"{name[:80]!r} can't be the name of a token",
            f"a name has up to 63 letters, digits, '.', '_', '@' and '-', and isn't {' or '.join(RESERVED)}",
            "Choose another.",
        )
    return name


def _made(name: str, scope: Scope, *, expires_in: float | None, kind: str = "bearer") -> tuple[Token, str]:
    now, secret, token_id = time.time(), secrets.token_urlsafe(32), secrets.token_hex(6)
    token = Token(
        id=token_id,
        name=name,
        scope=scope,
        created_at=now,
        expires_at=None if expires_in is None else now + expires_in,
        kind="join" if kind == "join" else "bearer",
        digest=_digest(secret),
    )
    return token, f"{JOIN if kind == 'join' else BEARER}.{token_id}.{secret}"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _found(known: dict[str, Token], shown: str, kind: str) -> Token:
    prefix, _, rest = shown.partition(".")
    token_id, _, secret = rest.partition(".")
    found = known.get(token_id)
    digest = found.digest if found is not None else _digest("")
    same = hmac.compare_digest(digest, _digest(secret))
    if found is None or not same or found.kind != kind or prefix != (JOIN if kind == "join" else BEARER):
        raise Unauthorized(
            "the join token isn't known" if kind == "join" else "the token isn't known",
            "it was used already, or it was revoked" if kind == "join" else "it was revoked, or it is of another host",
            _REFUSED.replace("create", "join") if kind == "join" else _REFUSED,
        )
    return _good(found)


def _good(token: Token) -> Token:
    if _has_expired(token, time.time()):
        at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(token.expires_at))
        raise Unauthorized(f"the token '{token.name}' has expired", f"it was good until {at}", _REFUSED)
    return token


def _has_expired(token: Token, now: float) -> bool:
    return token.expires_at is not None and token.expires_at <= now


def _is_stale(token: Token, now: float) -> bool:
    return token.kind == "join" and token.expires_at is not None and token.expires_at + _KEPT_JOINS <= now


def _free(name: str, tokens: Iterable[Token]) -> str:
    taken = {each.name for each in tokens}
    numbered = (name if number == 1 else f"{name[:58]}-{number}" for number in range(1, len(taken) + 2))
    return next(each for each in numbered if each not in taken)
