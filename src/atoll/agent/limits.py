"""What one client may take of the agent, so that there is enough for the others.

connections   the head of a request has to come in some seconds; when there are very many, the one that has been
              idle the longest is closed
bodies        the rest of a request has to go on coming, not too slowly
answers       have to be taken when they are whole, not too slowly; others have their turn between two pieces of one
rate          a bucket of tokens for each principal, which fills again by the second
concurrency   requests and streams at work, and tasks that run, for each principal
"""

import asyncio
import contextlib
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
from litestar.exceptions import HTTPException

from atoll.agent.problems import PROBLEM_TYPE, problem_of
from atoll.agent.tls import PeerProtocol
from atoll.errors import TooMany

RATE = 5000
"""Requests a second of one principal; twice as many at once after some rest. More than this computer can do mostly."""
AT_WORK = 500
STREAMS = 500
TASKS = 1000
"""Of one principal: requests at work, WebSockets, tasks that run."""
KEEP_ALIVE = 75
"""Seconds that an idle connection is kept; longer than clients of ours keep theirs, so that none is closed in use."""
_HEAD_TIMEOUT = 10.0
_PATIENCE = 60.0
_SLOWEST = 1024
"""Seconds that are waited for somebody who sends a body, or takes an answer, and one more for so many bytes."""
_LARGEST_HEAD = 64 << 10
_FILES = 1 << 16
_FOR_OTHER_USES = 1024
"""Descriptors that are left to all but connections."""


def raise_file_limit() -> int:
    """As many open files as may be, and not more than can be of use; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


class Connections:
    """Those of the agent that wait for a request, the longest first."""

    def __init__(self, files: int) -> None:
        self.most = max(files - _FOR_OTHER_USES, files // 2)
        self.idle: dict[GuardedProtocol, None] = {}

    def protocol(self, **options: Any) -> asyncio.Protocol:
        """What uvicorn takes for `http`: makes the protocol of one connection."""
        return GuardedProtocol(self, **options)

    def make_room(self, open_now: int) -> None:
        if open_now > self.most and self.idle:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.transport.close()


class GuardedProtocol(PeerProtocol):
    """uvicorn's, which waits for ever for the head of a request."""

    def __init__(self, among: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._among = among
        self._timer: asyncio.TimerHandle | None = None
        self._head = 0
        self._waits = True
        """For a request, or for the rest of its head."""
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._among.idle[self] = None
        self._among.make_room(len(self.connections))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._among.idle.pop(self, None)
        self._forget_timer()
        if self._taking is not None:
            self._taking.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._waits:
            self._expect_head()
            self._head += len(data)
        super().data_received(data)
        if self._waits and self._head > _LARGEST_HEAD:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._waits, self._head = False, 0
        self._among.idle.pop(self, None)
        self._forget_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self._waits = not self.pipeline
        self._among.idle[self] = None
        self._expect_taking()
        super().on_response_complete()

    def _expect_taking(self) -> None:
        """Cut the client off unless it takes what is left of an answer that is whole; nothing else would ever."""
        if self._taking is not None:
            self._taking.cancel()
        left = self.transport.get_write_buffer_size()
        if left:
            self._taking = self.loop.call_later(_PATIENCE + left / _SLOWEST, self._cut_off)

    def _cut_off(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(_HEAD_TIMEOUT, self.transport.close)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Bucket:
    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = rate * 2
        self.at = time.monotonic()

    def take(self) -> float:
        """Seconds until there is a token again; 0 when one was taken."""
        now = time.monotonic()
        self._tokens = min(self._rate * 2, self._tokens + (now - self.at) * self._rate)
        self.at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


class Limited:
    """The application, for clients that don't ask too much. Others get 429 before anything is done for them."""

    def __init__(self, app: Any, *, rate: float = RATE) -> None:
        self._app = app
        self._rate = rate
        self._buckets: dict[str, _Bucket] = {}
        self._at_work: Counter[tuple[str, str]] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        who = _who(scope)
        try:
            with self._admitted(who, scope["type"]):
                if scope["type"] == "http":
                    receive, send = _timely(receive), _in_turn(send)
                await self._app(scope, receive, send)
        except TooMany as error:
            await _refuse(scope, send, error)

    @contextlib.contextmanager
    def _admitted(self, who: str, kind: str) -> Iterator[None]:
        self._take_token(who)
        most = STREAMS if kind == "websocket" else AT_WORK
        if self._at_work[who, kind] >= most:
            raise TooMany(f"{most} requests of yours are at work", next_step="Wait for some of them.")
        self._at_work[who, kind] += 1
        try:
            yield
        finally:
            self._at_work[who, kind] -= 1
            if not self._at_work[who, kind]:
                del self._at_work[who, kind]

    def _take_token(self, who: str) -> None:
        if not self._rate:
            return
        if len(self._buckets) > 10_000:
            full = time.monotonic() - 2
            self._buckets = {name: each for name, each in self._buckets.items() if each.at > full}
        if self._buckets.setdefault(who, _Bucket(self._rate)).take():
            raise TooMany(
                "these are too many requests", f"one client may send {self._rate:g} a second", "Wait a second."
            )


def check_tasks(running: int) -> None:
    """Raises `TooMany`."""
    if running >= TASKS:
        raise TooMany(f"{TASKS} tasks of yours run", next_step="Wait for some of them, or cancel them.")


def _who(scope: Any) -> str:
    """Who asks; of those that nobody knows, from where."""
    principal = scope.get("state", {}).get("principal", "local")
    client = scope.get("client")
    return f"@{client[0] if client else ''}" if principal == "nobody" else str(principal)


def _timely(receive: Callable[[], Any]) -> Callable[[], Any]:
    """The messages of a request, whose body goes on coming. Only the time counts in which it is waited for."""
    whole, came, waited = False, 0, 0.0

    async def timely() -> Any:
        nonlocal whole, came, waited
        if whole:
            return await receive()
        begun = time.monotonic()
        try:
            async with asyncio.timeout(_PATIENCE + came / _SLOWEST - waited):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(status_code=408, detail="the rest of the request didn't come in time") from error
        waited += time.monotonic() - begun
        came += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        return message

    return timely


def _in_turn(send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """An answer of many pieces that are all there would otherwise be sent in one go, even to a client that has gone."""

    async def in_turn(message: Any) -> None:
        await send(message)
        if message.get("more_body"):
            await asyncio.sleep(0)

    return in_turn


async def _refuse(scope: Any, send: Any, error: TooMany) -> None:
    if scope["type"] == "websocket":
        scope.setdefault("state", {})["refused"] = error
        await send({"type": "websocket.close", "code": 1013, "reason": error.what})
        return
    headers = [(b"content-type", PROBLEM_TYPE.encode()), (b"retry-after", b"1"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(problem_of(error))})
