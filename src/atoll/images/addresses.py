"""Addresses on the web, as they may be shown and kept."""

from urllib.parse import urlsplit, urlunsplit


def is_http(url: str) -> bool:
    """Whether it is a whole http:// or https:// address."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def public(url: str) -> str:
    """The address without login and query, which may be secrets."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
