"""The handlers of the calls in `platform/routes.py`: each of them made of its row."""

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec

from atoll.agent import limits, lists
from atoll.agent.access import Access, require
from atoll.agent.matching import insisting, tag_of
from atoll.agent.metrics import Meter
from atoll.agent.tasks import Tasks, Wanted, Work
from atoll.errors import InvalidInput
from atoll.model.task import Problem, Task
from atoll.model.vm import VmInfo
from atoll.platform import routes
from atoll.platform.api import AsyncHost, Report
from atoll.platform.copies import AsyncCopies
from atoll.platform.local import LocalHost
from atoll.platform.routes import Call

WAIT = 30.0
"""Seconds that a call waits for its end, unless the client prefers otherwise (RFC 7240)."""
LONGEST_WAIT = 300.0
SECRETS = ("password_hash", "user_data")
"""Fields of what VMs were made with, in records and in the journal."""


class Agent:
    """What the handlers share."""

    def __init__(self, host: LocalHost, access: Access, *, scraped: Callable[[], None] = lambda: None) -> None:
        """`scraped` is told that somebody reads the metrics."""
        self.host = host
        self.access = access
        self.tasks = Tasks()
        self.meter = Meter()
        self.scraped = scraped


def handler_of(call: Call, agent: Agent) -> HTTPRouteHandler:
    """The Litestar handler of one call."""
    if call.changes:
        run = _changing(call, agent)
    else:
        run = _reading(call, agent)
    _sign(run, call)
    return HTTPRouteHandler(
        routes.VERSION + _typed_path(call),
        http_method=call.http,
        name=call.name,
        operation_id=call.name.replace(".", "_"),
        status_code=200,
        tags=[call.path.split("/")[1]],
        summary=_summary(call),
        description=inspect.getdoc(call.method),
        responses=_responses(call),
        opt={"scope": call.scope},
    )(run)


def _typed_path(call: Call) -> str:
    types = {each.name: "int" if each.type is int else "str" for each in routes.in_path(call)}
    return re.sub(r"\{(\w+)\}", lambda found: f"{{{found[1]}:{types.get(found[1], 'str')}}}", call.path)


def _summary(call: Call) -> str:
    return (inspect.getdoc(call.method) or call.name.replace(".", " ").replace("_", " ")).split("\n")[0]


def _responses(call: Call) -> dict[int, ResponseSpec]:
    problem = ResponseSpec(Problem, description="what happened, why, and what to do next", generate_examples=False)
    told = dict.fromkeys((400, 401, 403, 404, 409, 422, 424, 429, 507), problem)
    if call.changes:
        told[202] = ResponseSpec(Task, description="it goes on: follow the task", generate_examples=False)
        told[412] = problem
    return told


def _sign(run: Any, call: Call) -> None:
    """Give a handler the signature that Litestar reads: types for its checks and for the OpenAPI document."""
    kind = inspect.Parameter
    wanted: list[inspect.Parameter] = [kind("request", kind.KEYWORD_ONLY, annotation=Request)]
    if "{vm}" in call.path:
        wanted.append(kind("vm", kind.KEYWORD_ONLY, annotation=str))
    for each in (*routes.in_path(call), *routes.in_query(call)):
        default = kind.empty if each.required or each in routes.in_path(call) else each.default
        wanted.append(kind(each.name, kind.KEYWORD_ONLY, annotation=each.type, default=default))
    wanted += lists.parameters(call.name)
    if (body := routes.body(call)) is not None:
        optional = all(not field.required for field in msgspec.structs.fields(body))
        annotation, default = (body | None, None) if optional else (body, kind.empty)
        wanted.append(kind("data", kind.KEYWORD_ONLY, annotation=annotation, default=default))
    returned = routes.result(call)
    run.__name__ = call.name.replace(".", "_")
    run.__signature__ = inspect.Signature(wanted, return_annotation=returned)
    run.__annotations__ = {each.name: each.annotation for each in wanted} | {"return": returned}


def _reading(call: Call, agent: Agent) -> Any:
    filters = [each.name for each in lists.parameters(call.name)]

    async def run(request: Any, vm: str | None = None, data: Any = None, **values: Any) -> Any:
        asked = {name: values.pop(name) for name in filters}
        found = await perform(call, agent.host, vm=vm, values=values, data=data, report=None)
        headers: dict[str, str] = {}
        if filters:
            found, headers = lists.page(call.name, found, asked, request.url.path)
        shown = found if request.scope["state"]["scope"] != "read" else without_secrets(msgspec.to_builtins(found))
        content = msgspec.json.encode(shown)
        headers["ETag"] = tag = tag_of(found, content)
        if request.headers.get("if-none-match") == tag:
            return Response(None, status_code=304, headers=headers)
        return Response(content, media_type="application/json", headers=headers)

    return run


def without_secrets(value: Any) -> Any:
    """The same without what somebody who only looks could enter guests by."""
    if isinstance(value, dict):
        return {key: None if key in SECRETS else without_secrets(each) for key, each in value.items()}
    return [without_secrets(each) for each in value] if isinstance(value, list) else value


def _changing(call: Call, agent: Agent) -> Any:
    async def run(request: Any, vm: str | None = None, data: Any = None, **values: Any) -> Any:
        require(request.scope["state"], routes.scope_of(call, data))
        if data is None and routes.body(call) is not None and await request.body():
            raise InvalidInput("the request can't be used", "its body is null", "Send an object, or no body.")
        subject = vm or next((str(each) for each in values.values()), "") or getattr(data, "name", None) or ""

        async def work(report: Report) -> Any:
            insisted = request.headers.get("if-match")
            with (
                agent.meter.measuring(call.name),
                insisting(insisted, call, services=agent.host.services, vm=vm, values=values),
            ):
                return await perform(call, agent.host, vm=vm, values=values, data=data, report=report)

        return await as_task(agent, request, call=call.name, subject=subject, asked=[vm, dict(values), data], work=work)

    return run


async def as_task(agent: Agent, request: Any, *, call: str, subject: str, asked: Any, work: Work) -> Response[Any]:
    """Do it as a task; its result, or the task if that takes longer than the client wants to wait."""
    wait = _preferred_wait(request.headers.get("prefer", ""))
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 200:
        raise InvalidInput("the idempotency key can't be used", "it has no or more than 200 characters")
    request.scope["state"]["subject"] = subject
    wanted = Wanted(
        call=call,
        subject=subject,
        principal=principal_of(request),
        key=key,
        digest=hashlib.sha256(msgspec.json.encode([call, asked])).hexdigest(),
    )

    async def encoded(report: Report) -> Any:
        return msgspec.Raw(msgspec.json.encode(await work(report)))

    limits.check_tasks(agent.tasks.running(wanted.principal))
    task = agent.tasks.begin(wanted, encoded)
    if wait:
        task = await agent.tasks.ended(task.id, principal=wanted.principal, seconds=wait)
    return _answer(task)


def principal_of(request: Any) -> str:
    """Who asks, as the log of what was done names him."""
    return str(request.scope["state"]["principal"])


def _preferred_wait(prefer: str) -> float:
    if "respond-async" in prefer and "wait" not in prefer:
        return 0.0
    found = re.search(r"\bwait=(\d{1,6})", prefer)
    return min(float(found[1]), LONGEST_WAIT) if found else WAIT


def _answer(task: Task) -> Response[Any]:
    headers = {"Atoll-Task": task.id}
    if task.state == "running":
        headers["Location"] = f"{routes.VERSION}/tasks/{task.id}"
        # Told, since Litestar would take the answer of a call that returns text for text.
        return Response(task, status_code=202, headers=headers, media_type="application/json")
    if task.error is not None:
        return Response(
            task.error, status_code=task.error.status, headers=headers, media_type="application/problem+json"
        )
    return Response(bytes(task.result), headers=headers, media_type="application/json")


async def perform(
    call: Call, host: AsyncHost, *, vm: str | None, values: Mapping[str, Any], data: Any, report: Report | None
) -> Any:
    """Call the method of the façade, and give what it returns in the form that travels."""
    body = routes.body(call)
    given = body() if data is None and body is not None else data
    positional, named = routes.arguments(call, values, given)
    method = await _bound(call, host, vm)
    if report is not None and "report" in inspect.signature(call.method).parameters:
        named["report"] = report
    returned = await method(*positional, **named)
    if isinstance(returned, AsyncCopies):
        return [await each.info() for each in returned]
    if routes.result(call) is VmInfo and not isinstance(returned, VmInfo):
        return await returned.info()
    return returned


async def _bound(call: Call, host: AsyncHost, vm: str | None) -> Any:
    """The method on the object that it is of."""
    if call.target == "AsyncVm":
        receiver: Any = await host.get(vm or "")
    elif call.target == "AsyncGroups":
        receiver = host.networks.groups
    else:
        receiver = host if call.target == "AsyncHost" else getattr(host, call.target.removeprefix("Async").lower())
    if call.method.__module__ == routes.__name__:
        return lambda *positional, **named: call.method(receiver, *positional, **named)
    return getattr(receiver, call.method.__name__)
