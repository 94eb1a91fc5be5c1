"""Who may use an agent from elsewhere, and for what."""

from typing import Literal

from msgspec import Struct

Scope = Literal["read", "operate", "admin"]
"""`read` looks, `operate` works with VMs, `admin` may do what names files of the host's or runs its programs."""
SCOPES: tuple[Scope, ...] = ("read", "operate", "admin")


def includes(held: Scope, wanted: Scope) -> bool:
    """Each scope has those before it."""
    return SCOPES.index(held) >= SCOPES.index(wanted)


class Token(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A right to use the agent. Its secret is kept by who has it; here is only a digest."""

    id: str
    name: str
    scope: Scope
    created_at: float
    expires_at: float | None = None
    last_used_at: float | None = None
    kind: Literal["bearer", "join"] = "bearer"
    """`join` is good for one thing, once: to be exchanged for one that lasts."""
    digest: str = ""
    """SHA-256 of the secret: 256 random bits need no salt, and no slow hash."""


class TokenInfo(Struct, frozen=True, kw_only=True):
    """A token as it is shown."""

    name: str
    scope: Scope
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    expired: bool
    joins: bool
    """It waits to be exchanged."""


class JoinRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A one-time secret, for a token that lasts."""

    secret: str
    name: str
    """What the new token shall be called; another name is made of it when it is taken."""


class Joined(Struct, frozen=True, kw_only=True):
    """The token that lasts."""

    token: str
    name: str
    scope: Scope


class WhoAmI(Struct, frozen=True, kw_only=True):
    """What an agent takes a client for."""

    name: str
    scope: Scope
    expires_at: float | None
    version: str
    """The agent's Atoll."""
