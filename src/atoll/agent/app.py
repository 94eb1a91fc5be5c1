"""The HTTP API: `platform/routes.py` as Litestar handlers, the tasks, the events, and the OpenAPI document."""

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from litestar import Litestar, Request, Response, Router, get, post
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.params import Parameter
from litestar.response import ServerSentEvent, ServerSentEventMessage

from atoll import __version__
from atoll.agent import lists, problems
from atoll.agent.access import guard, is_admin
from atoll.agent.bytes import byte_handlers
from atoll.agent.connections import connection_handlers
from atoll.agent.document import DocumentPlugin
from atoll.agent.handlers import Agent, handler_of, principal_of
from atoll.agent.health import health_handlers
from atoll.agent.joining import joining_handlers
from atoll.agent.streams import stream_handlers
from atoll.agent.transfers import transfer_handlers
from atoll.errors import AtollError
from atoll.model.task import Task
from atoll.model.vm import Event
from atoll.platform import routes

LARGEST_BODY = 1 << 20
"""Bytes of a JSON request; files travel otherwise."""
LAST_EVENT = (1 << 63) - 1
"""No event has a larger number."""


def make_app(agent: Agent) -> Litestar:
    """The application."""
    handlers = [handler_of(call, agent) for call in routes.CALLS]
    return Litestar(
        [
            *handlers,
            *_task_handlers(agent),
            *_event_handlers(agent),
            *byte_handlers(agent),
            *transfer_handlers(agent),
            *stream_handlers(agent),
            *health_handlers(agent),
            *connection_handlers(agent),
            *joining_handlers(agent),
        ],
        guards=[guard],
        openapi_config=OpenAPIConfig(
            title="Atoll",
            version=__version__,
            openapi_router=Router(path="/v1/schema", route_handlers=[], opt={"scope": "read"}),
            description="Virtual machines of this computer.",
            use_handler_docstrings=True,
            render_plugins=[DocumentPlugin()],
        ),
        exception_handlers={
            AtollError: problems.on_atoll_error,
            HTTPException: problems.on_http_exception,
            RecursionError: problems.on_recursion_error,
            Exception: problems.on_anything,
        },
        request_max_body_size=LARGEST_BODY,
        logging_config=None,
    )


def _viewer(request: Request) -> dict[str, Any]:  # type: ignore[type-arg]
    return {"principal": principal_of(request), "admin": is_admin(request.scope["state"])}


def _task_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    @get("/v1/tasks", tags=["tasks"], operation_id="tasks_ls", opt={"scope": "read"})
    async def ls(
        request: Request,  # type: ignore[type-arg]
        limit: lists.Limit = lists.LONGEST,
        after: lists.After = None,
        name: lists.Name = None,
        in_state: lists.TaskStates = None,
    ) -> Response[list[Task]]:
        """Requests that changed something, the newest first: one's own, and everybody's for an admin."""
        asked = {"limit": limit, "after": after, "name": name, "in_state": in_state}
        tasks = agent.tasks.ls(None if is_admin(request.scope["state"]) else principal_of(request))
        found, headers = lists.page("tasks.ls", tasks, asked, request.url.path)
        return Response(found, headers=headers)

    @get("/v1/tasks/{task:str}", tags=["tasks"], operation_id="tasks_show", opt={"scope": "read"})
    async def show(
        request: Request,  # type: ignore[type-arg]
        task: str,
        wait: Annotated[float, Parameter(ge=0, le=300, description="seconds to wait for its end")] = 0.0,
    ) -> Task:
        """One, by its id or its idempotency key."""
        return await agent.tasks.ended(task, seconds=wait, **_viewer(request))

    # What it is that is cancelled was allowed, or it wouldn't be one's own.
    @post(
        "/v1/tasks/{task:str}/cancel",
        status_code=202,
        tags=["tasks"],
        operation_id="tasks_cancel",
        opt={"scope": "read"},
    )
    async def cancel(request: Request, task: str) -> Task:  # type: ignore[type-arg]
        """Ask it to undo what it did."""
        return agent.tasks.cancel(task, **_viewer(request))

    @get("/v1/tasks/{task:str}/events", tags=["tasks"], operation_id="tasks_follow", opt={"scope": "read"})
    async def follow(request: Request, task: str) -> ServerSentEvent:  # type: ignore[type-arg]
        """Server-sent events: the task at each change, until it has ended."""
        agent.tasks.show(task, **_viewer(request))

        async def stream() -> AsyncIterator[ServerSentEventMessage]:
            async with contextlib.aclosing(agent.tasks.follow(task, **_viewer(request))) as states:
                async for state in states:
                    yield ServerSentEventMessage(data=msgspec.json.encode(state).decode(), event="task")

        return ServerSentEvent(stream())

    return [ls, show, cancel, follow]


def _event_handlers(agent: Agent) -> list[HTTPRouteHandler]:
    @get("/v1/events", tags=["events"], operation_id="events_follow", opt={"scope": "read"})
    async def follow(
        request: Request,  # type: ignore[type-arg]
        after: Annotated[
            int | None, Parameter(ge=0, le=LAST_EVENT, description="the last event that is known already")
        ] = None,
    ) -> ServerSentEvent:
        """Server-sent events: what happens. `Last-Event-ID` goes on where a connection was lost."""
        last = request.headers.get("last-event-id", "")
        wanted = min(int(last), LAST_EVENT) if re.fullmatch("[0-9]{1,30}", last) else after
        known = agent.host.last_event() if wanted is None else wanted

        async def stream() -> AsyncIterator[ServerSentEventMessage]:
            # Who loses the connection before the first event knows by this where to go on.
            yield ServerSentEventMessage(data=None, id=known, comment="from here on")
            async with contextlib.aclosing(agent.host.events(follow=True, after=known)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield ServerSentEventMessage(
                        data=msgspec.json.encode(event).decode(), id=event.id, event=event.kind
                    )

        return ServerSentEvent(stream())

    @get("/v1/events/past", tags=["events"], operation_id="events_ls", opt={"scope": "read"})
    async def ls(
        request: Request,  # type: ignore[type-arg]
        after: Annotated[int, Parameter(ge=0, le=LAST_EVENT)] = 0,
        limit: lists.Limit = lists.LONGEST,
        name: lists.Name = None,
        kind: Annotated[
            list[str] | None, Parameter(description="such as `vm.started`; several are each welcome")
        ] = None,
    ) -> Response[list[Event]]:
        """What happened, oldest first."""
        found: list[Event] = []
        async with contextlib.aclosing(agent.host.events(follow=False, after=after)) as events:  # type: ignore[type-var]
            async for event in events:
                if lists.is_event(event, name, kind):
                    found.append(event)
                if len(found) > limit:
                    break
        if len(found) <= limit:
            return Response(found)
        asked = {"limit": limit, "name": name, "kind": kind, "after": found[limit - 1].id}
        return Response(found[:limit], headers=lists.link(request.url.path, asked))

    return [follow, ls]
