"""HTTP to an agent: requests, tasks with their progress, streams, and errors that are what they were over there."""

import asyncio
import contextlib
import re
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpcore
import msgspec

from atoll import errors
from atoll.errors import AtollError, NetworkFailed, NotFound
from atoll.host.sockets import address_of
from atoll.model.task import Problem, Task
from atoll.platform import lenient, routes
from atoll.platform.api import Report
from atoll.platform.reach import ConnectionLost, keep_alive_options, lost, persistently, why_not
from atoll.platform.routes import Call

WAIT = 60
"""Seconds that a request may wait for the end of a call before it asks again."""
CANCEL_TIMEOUT = 120.0
LONG = 64 << 10
"""Bytes of an answer that is worth keeping."""
AGENT_HEADER = b"atoll-agent"
"""Names the process that answers."""
ATTEMPTS = 5
"""How often a request is sent whose connection is lost each time."""
_CONNECT = {"connect": 10.0, "read": WAIT + 30.0, "write": 60.0, "pool": None}
_NEXT_PAGE = re.compile('<(.*)>; rel="next"')
_STREAM = {"connect": 10.0, "read": None, "write": None, "pool": None}

_KINDS: dict[str, type[AtollError]] = {
    each.code: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, AtollError) and each is not errors.DisksChanged
}


def error_of(problem: Problem) -> AtollError:
    """The error that the other side raised."""
    return _KINDS.get(problem.code, AtollError)(problem.what, problem.why, problem.next_step)


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where an agent listens."""

    url: str
    """`https://host:port`; for a socket only its `http://atoll`."""
    socket: str | None = None
    token: str | None = None
    tls: ssl.SSLContext | None = None

    @property
    def shown(self) -> str:
        return self.socket or self.url


class Wire:
    """Connections to one agent, opened when they are needed and kept."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._known: dict[str, tuple[str, list[Any]]] = {}
        """The last long list, with its tag."""
        self._held = contextlib.ExitStack()
        # The address of a socket is short, its path may not be.
        self.socket = self._held.enter_context(address_of(Path(place.socket))) if place.socket is not None else None
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=place.tls,
            uds=self.socket,
            max_connections=100,
            keepalive_expiry=30.0,
            socket_options=None if self.socket is not None else keep_alive_options(),
        )
        self._agent: bytes | None = None
        """Which agent answered last: one that was started anew is another one."""

    async def close(self) -> None:
        await self._pool.aclose()
        self._held.close()

    @contextlib.asynccontextmanager
    async def request(
        self,
        http: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        endless: bool = False,
    ) -> AsyncIterator[httpcore.Response]:
        """One request; its answer's body is still to be read. Raises what the answer says, or `NetworkFailed`."""
        target = f"{self.place.url}{path}"
        if query:
            target += "?" + urlencode({key: _as_text(value) for key, value in query.items() if value is not None})
        sent = {"User-Agent": "atoll", **(headers or {})}
        if self.place.token is not None:
            sent["Authorization"] = f"Bearer {self.place.token}"
        if isinstance(content, bytes):
            sent.setdefault("Content-Type", "application/json")
        extensions = {"timeout": _STREAM if endless else _CONNECT}
        try:
            async with self._pool.stream(
                http, target, headers=list(sent.items()), content=content, extensions=extensions
            ) as response:
                self._agent = dict(response.headers).get(AGENT_HEADER, self._agent)
                if response.status >= 400:
                    raise refused(response.status, await response.aread())
                yield response
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            raise why_not(self.place.shown, error) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise lost(self.place.shown, error) from error

    async def get(self, path: str, kind: Any, *, query: Mapping[str, Any] | None = None) -> Any:
        async with self.request("GET", path, query=query) as response:
            found, headers = decoded(await response.aread(), kind), dict(response.headers)
        # Long lists come in pages.
        while more := _NEXT_PAGE.fullmatch(headers.get(b"link", b"").decode()):
            async with self.request("GET", more[1]) as response:
                found += decoded(await response.aread(), kind)
                headers = dict(response.headers)
        return found

    async def call(self, call: Call, receiver: str | None, given: Mapping[str, Any], report: Report | None) -> Any:
        """Do what a method of the façade does, over there. Cancelling it cancels it there, and waits for the undo."""
        path, query, content = _asked(call, receiver, given)
        if not call.changes:
            return await persistently(lambda: self._read(path, routes.result(call), query=query))
        return await self.change(call.http, path, query=query, content=content, kind=routes.result(call), report=report)

    async def _read(self, path: str, kind: Any, *, query: Mapping[str, Any]) -> Any:
        """As `get`; a long list that is the same as the last time (`ETag`) isn't sent and decoded again."""
        known = self._known.get(path) if not query else None
        headers = {"If-None-Match": known[0]} if known is not None else {}
        async with self.request("GET", path, query=query, headers=headers) as response:
            body = await response.aread()
        if known is not None and response.status == 304:
            return list(known[1])
        found = decoded(body, kind)
        tag = dict(response.headers).get(b"etag", b"").decode()
        if not query and tag and len(body) > LONG and isinstance(found, list):
            self._known.clear()
            self._known[path] = tag, list(found)
        return found

    async def change(
        self,
        http: str,
        path: str,
        *,
        kind: Any,
        query: Mapping[str, Any] | None = None,
        content: bytes | None = None,
        report: Report | None = None,
    ) -> Any:
        """A request that is a task over there: its result, as `kind`."""
        key = uuid.uuid4().hex
        try:
            return await self._change(http, path, kind=kind, query=query, content=content, key=key, report=report)
        except asyncio.CancelledError:
            await asyncio.shield(self._cancel(key))
            raise

    async def _change(
        self,
        http: str,
        path: str,
        *,
        kind: Any,
        query: Mapping[str, Any] | None,
        content: bytes | None,
        key: str,
        report: Report | None,
    ) -> Any:
        prefer = f"wait={WAIT}" if report is None else "respond-async"
        headers = {"Idempotency-Key": key, "Prefer": prefer}

        async def send() -> Any:
            async with self.request(http, path, query=query, content=content, headers=headers) as response:
                said = await response.aread()
            return decoded(said, Task if response.status == 202 else kind)

        task = await self._begun(send, key)
        if not isinstance(task, Task):
            return task
        task = await self._ended(task, report)
        if task.state == "lost":
            raise _forgotten(self.place)
        if task.error is not None:
            raise error_of(task.error)
        return lenient.convert(task.result, kind)

    async def _begun(self, send: Callable[[], Awaitable[Any]], key: str) -> Any:
        """What `send` gives. Where the connection is lost meanwhile, the task that it began, or what it gives anew."""
        agent = self._agent
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(ConnectionLost):
                return await send()
            try:
                return await persistently(lambda: self._task(key), was_lost=True)
            except NotFound as error:
                # It never arrived; or it did, at an agent that was started anew since and doesn't know what it did.
                if agent is None or agent != self._agent:
                    raise _forgotten(self.place) from error
        return await send()

    async def _task(self, reference: str) -> Task:
        return await self.get(f"{routes.VERSION}/tasks/{reference}", Task, query={"wait": 0})  # type: ignore[no-any-return]

    async def _ended(self, task: Task, report: Report | None) -> Task:
        """The task at its end; its progress is told as it comes."""
        path = f"{routes.VERSION}/tasks/{task.id}"
        try:
            if report is not None:
                async for _, data in self.events(f"{path}/events"):
                    task = decoded(data, Task)
                    if task.progress is not None:
                        report(task.progress)
            while task.state == "running":
                task = await persistently(lambda: self.get(path, Task, query={"wait": WAIT}))
        except NotFound as error:
            raise _forgotten(self.place) from error
        return task

    async def _cancel(self, key: str) -> None:
        """Cancel what was begun with this key, and wait until it is undone; it may have ended already."""
        with contextlib.suppress(AtollError, TimeoutError):
            async with asyncio.timeout(CANCEL_TIMEOUT):
                async with self.request("POST", f"{routes.VERSION}/tasks/{key}/cancel"):
                    pass
                while (await self.get(f"{routes.VERSION}/tasks/{key}", Task, query={"wait": WAIT})).state == "running":
                    pass

    async def events(self, path: str, *, query: Mapping[str, Any] | None = None) -> AsyncIterator[tuple[str, bytes]]:
        """Server-sent events: the id and the data of each, until the other side ends the stream.

        A connection that was lost is made anew, and goes on after the last event that came.
        """
        last, again = "", False
        while True:
            stack = contextlib.AsyncExitStack()

            async def open_it(stack: contextlib.AsyncExitStack = stack, last: str = last) -> httpcore.Response:
                headers = {"Last-Event-ID": last} if last else {}
                request = self.request("GET", path, query=query, headers=headers, endless=True)
                return await stack.enter_async_context(request)

            try:
                async with stack:
                    response = await (persistently(open_it, was_lost=True) if again else open_it())
                    async for number, data in _events_of(response):
                        last = number
                        if data:
                            yield number, data
                    return
            except ConnectionLost:
                again = True

    async def bytes_of(self, path: str, *, query: Mapping[str, Any] | None = None) -> AsyncIterator[bytes]:
        """An answer's body as it comes."""
        async with self.request("GET", path, query=query, endless=True) as response:
            async for piece in response.aiter_stream():
                yield piece


async def _events_of(response: httpcore.Response) -> AsyncIterator[tuple[str, bytes]]:
    """Each event; one without data tells only its id."""
    number, data, rest = "", b"", b""
    async for piece in response.aiter_stream():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            name, _, value = line.rstrip(b"\r").partition(b":")
            if name == b"id":
                number = value.strip().decode()
            elif name == b"data":
                data += value.strip()
            elif not name and not value:
                yield number, data
                data = b""


def _forgotten(place: Place) -> NetworkFailed:
    return NetworkFailed(
        f"the connection to the agent at {place.shown} was lost",
        "it doesn't know what it was asked: that never came, or it was started anew meanwhile",
        "`atoll operation ls` tells what became of it.",
    )


def _asked(call: Call, receiver: str | None, given: Mapping[str, Any]) -> tuple[str, dict[str, Any], bytes | None]:
    """Path, query and body of a call."""
    path = routes.VERSION + call.path.replace("{vm}", quote(receiver or "", safe=""))
    for each in routes.in_path(call):
        path = path.replace(f"{{{each.name}}}", quote(str(given[each.name]), safe=""))
    query = {each.name: given[each.name] for each in routes.in_query(call) if each.name in given}
    kind = routes.body(call)
    if kind is None:
        return path, query, None
    rest = {name: value for name, value in given.items() if f"{{{name}}}" not in call.path}
    whole = next(iter(rest.values()), None) if routes.is_whole_body(call) else rest
    return path, query, msgspec.json.encode(whole, enc_hook=str)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def refused(status: int, body: bytes) -> AtollError:
    try:
        return error_of(msgspec.json.decode(body, type=Problem))
    except msgspec.DecodeError:
        said = body[:200].decode(errors="replace")
        return NetworkFailed("the agent's answer can't be read", f"HTTP {status}: {said}", "Is it an agent of Atoll's?")


def decoded(body: bytes, kind: Any) -> Any:
    """An answer as the type that it has."""
    try:
        return lenient.decode(body, kind) if kind is not None and kind is not type(None) else None
    except msgspec.DecodeError as error:
        raise NetworkFailed(
            "the agent's answer can't be read", str(error), "Use the same version of Atoll on both sides."
        ) from error
