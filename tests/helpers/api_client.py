"""The HTTP API by hand, as a client of another maker's would use it."""

import httpx

from atoll.layout import Layout


def api(layout: Layout) -> httpx.AsyncClient:
    """Requests to the agent's socket."""
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(layout.agent_socket)), base_url="http://atoll", timeout=60
    )
