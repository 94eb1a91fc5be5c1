"""Which host is meant: this computer's, in this process or through its agent, or another one's agent."""

import contextlib
import os

from atoll import layout as layouts
from atoll.errors import InvalidInput
from atoll.layout import Layout
from atoll.platform.api import AsyncHost

HOST_VARIABLE = "ATOLL_HOST"
TOKEN_VARIABLE = "ATOLL_TOKEN"


def open_host(where: str | Layout | None = None) -> AsyncHost:
    """The host that `where` names: `https://…`, or this computer's when it is None. A layout is always used in this
    process. Raises `InvalidInput`.
    """
    if isinstance(where, str):
        return _remote(where)
    found = where or layouts.find()
    if where is None and agent_answers(found):
        from atoll.platform.remote import RemoteHost
        from atoll.platform.wire import Place

        return RemoteHost(Place(url="http://atoll", socket=str(found.agent_socket)))
    from atoll.platform.local import LocalHost

    return LocalHost(found)


def _remote(url: str) -> AsyncHost:
    if not url.startswith("https://"):
        raise InvalidInput(f"{url!r} can't be a host", next_step="Write it as https://NAME:PORT.")
    import ssl

    from atoll.platform.remote import RemoteHost
    from atoll.platform.wire import Place

    token = os.environ.get(TOKEN_VARIABLE)
    return RemoteHost(Place(url=url.rstrip("/"), token=token, tls=ssl.create_default_context()))


def agent_answers(layout: Layout) -> bool:
    """Whether an agent listens for local commands. A socket that a killed one left doesn't."""
    from atoll.host import sockets

    with contextlib.suppress(OSError), sockets.connect(layout.agent_socket):
        return True
    return False
