"""How somebody who was invited gets a token that lasts, and sees whom he speaks to; and the audit log."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import Parameter
from litestar.response import Stream

from atoll import __version__
from atoll.agent.access import PUBLIC
from atoll.agent.handlers import Agent
from atoll.errors import AtollError, NotFound
from atoll.model.token import Joined, JoinRequest, WhoAmI
from atoll.store import audit


def joining_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    layout = agent.host.layout

    @get("/v1/ca.pem", tags=["access"], operation_id="authority_show", opt={"scope": PUBLIC})
    async def authority() -> Response[bytes]:
        """The certificate of the agent's own authority. It is no secret; its fingerprint is what one trusts."""
        path = layout.credentials / "ca.pem"
        if not path.exists():
            raise NotFound("the agent has no certificate authority", "it was never served with --listen")
        return Response(path.read_bytes(), media_type="application/x-pem-file")

    @post("/v1/join", status_code=200, tags=["access"], operation_id="join", opt={"scope": PUBLIC})
    async def join(request: Request[Any, Any, Any], data: JoinRequest) -> Joined:
        """Exchange a one-time secret for a token that lasts."""
        state = request.scope["state"]
        try:
            joined = agent.access.tokens.join(data)
        except AtollError as error:
            state["refused"] = error
            raise
        state["subject"] = joined.name
        return joined

    @get("/v1/whoami", tags=["access"], operation_id="whoami", opt={"scope": "read"})
    async def whoami(request: Request[Any, Any, Any]) -> WhoAmI:
        """What the agent takes the client for."""
        state = request.scope["state"]
        return WhoAmI(
            name=state["principal"], scope=state["scope"], expires_at=state.get("expires_at"), version=__version__
        )

    @get("/v1/audit", tags=["access"], operation_id="audit_follow", opt={"scope": "admin"})
    async def log(follow: bool = False, tail: Annotated[int | None, Parameter(ge=0)] = None) -> Stream:
        """Who asked for what, a JSON object a line, oldest first; with `follow` for ever."""

        async def lines() -> AsyncIterator[bytes]:
            async for entry in audit.entries(layout.audit, follow=follow, tail=tail):
                yield msgspec.json.encode(entry) + b"\n"

        return Stream(lines(), media_type="application/x-ndjson")

    return [authority, join, whoami, log]
