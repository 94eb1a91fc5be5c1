"""Which host is meant: this computer's, in this process or through its agent, or another one's agent."""

import os
from pathlib import Path

from atoll import layout as layouts
from atoll.errors import InvalidInput
from atoll.layout import Layout
from atoll.platform.api import AsyncHost

TOKEN_VARIABLE = "ATOLL_TOKEN"


def open_host(
    where: str | Layout | None = None, *, token: str | None = None, ca: str | Path | None = None
) -> AsyncHost:
    """The host that `where` names: one that was noted, `https://…`, or this computer's when it is None. A layout is
    always used in this process. Raises `InvalidInput`, `NotFound`.
    """
    if isinstance(where, str):
        return _remote(where, token, ca)
    if token is not None or ca is not None:
        raise InvalidInput("a token and an authority are for other computers", next_step="Say which: https://….")
    found = where or layouts.find()
    from atoll.host import sockets

    if where is None and sockets.answers(found.agent_socket):
        from atoll.platform.remote import RemoteHost
        from atoll.platform.wire import Place

        return RemoteHost(Place(url="http://atoll", socket=str(found.agent_socket)))
    from atoll.platform.local import LocalHost

    return LocalHost(found)


def _remote(where: str, token: str | None, ca: str | Path | None) -> AsyncHost:
    from atoll.platform import known_hosts
    from atoll.platform.reach import tls_context
    from atoll.platform.remote import RemoteHost
    from atoll.platform.wire import Place

    if "://" not in where:
        return RemoteHost(known_hosts.place_of(known_hosts.get(where)))
    url = known_hosts.check_url(where)
    return RemoteHost(Place(url=url, token=token or os.environ.get(TOKEN_VARIABLE), tls=tls_context(ca)))
