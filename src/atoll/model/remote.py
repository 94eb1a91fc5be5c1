"""Other computers that a user has noted."""

from msgspec import Struct


class KnownHost(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One, with what opens it."""

    name: str
    url: str
    token: str
    ca: str | None = None
    """The certificate of its authority (PEM), which alone is trusted; None to trust those that the system does."""
    fingerprint: str = ""
    """Of that certificate: SHA-256."""
    added_at: float


class KnownHostInfo(Struct, frozen=True, kw_only=True):
    """One as it is shown."""

    name: str
    url: str
    fingerprint: str
    added_at: float
