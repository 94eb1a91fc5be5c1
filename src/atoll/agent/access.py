"""Who asks, and what he may. Every request and every WebSocket passes here, and is written down if it matters.

A `Door` stands before the application and finds out who asks; the guard, which each handler has, asks for the scope
that the handler names in its `opt`. One that names none lets nobody in.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from uvicorn.protocols.utils import ClientDisconnected

from atoll.agent.problems import PROBLEM_TYPE, problem_of
from atoll.agent.recover import MISHAP_DELAY, Tell
from atoll.errors import AtollError, Forbidden, NotFound, Unauthorized
from atoll.host.watch import changes
from atoll.layout import Layout
from atoll.model.audit import AuditEntry
from atoll.model.token import Scope, Token, includes
from atoll.store.audit import AuditLog
from atoll.store.tokens import Tokens

PUBLIC = "public"
"""Takes the place of a scope: whoever reaches the agent may ask."""
_NOTE_USES = 10.0
"""Seconds from a token's use to the note of it."""
_ENDED = 1008
"""WebSocket's code for what a policy forbids."""


class Access:
    """What the doors of one agent share."""

    def __init__(self, layout: Layout) -> None:
        self._path = layout.tokens
        self.tokens = Tokens(layout.tokens)
        self.audit = AuditLog(layout.audit)
        self.refused = AuditLog(layout.refused)
        """Of its own, so that no stranger can push out what others did."""
        self.open: dict[asyncio.Task[Any], str] = {}
        """What is served now, and the id of the token that it is served for."""
        self.ended: set[asyncio.Task[Any]] = set()
        self.used: dict[str, float] = {}
        self._was_used = asyncio.Event()

    async def watch(self, tell: Tell) -> None:
        """End what goes on for tokens that are revoked, and note when tokens were used; for ever.

        A mishap is told, and the watch goes on.
        """
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._note_uses_later())
                    await self._end_revoked()
            except* Exception as mishaps:
                tell(f"Error: watching over the tokens: {'; '.join(map(str, mishaps.exceptions))}")
            await asyncio.sleep(MISHAP_DELAY)

    async def _end_revoked(self) -> None:
        async for _ in changes(self._path):
            for serving, token_id in list(self.open.items()):
                if not self._is_good(token_id):
                    self._end(serving)

    @contextlib.contextmanager
    def serving(self, token: Token | None) -> Iterator["asyncio.Task[Any]"]:
        """While this task serves somebody with this token; it is cancelled when the token is good no more."""
        task = asyncio.current_task()
        assert task is not None
        expiry: asyncio.TimerHandle | None = None
        if token is not None:
            self.open[task] = token.id
            if token.expires_at is not None:
                rest = token.expires_at - time.time()
                expiry = asyncio.get_running_loop().call_later(rest, self._end, task)
        try:
            yield task
        finally:
            if expiry is not None:
                expiry.cancel()
            self.open.pop(task, None)
            self.ended.discard(task)

    def _end(self, serving: "asyncio.Task[Any]") -> None:
        if serving not in self.ended:
            self.ended.add(serving)
            serving.cancel()

    def _is_good(self, token_id: str) -> bool:
        try:
            return self.tokens.is_good(token_id)
        except AtollError:
            return False

    async def _note_uses_later(self) -> None:
        while await self._was_used.wait():
            await asyncio.sleep(_NOTE_USES)
            self._was_used.clear()
            await self.note_uses()

    async def note_uses(self) -> None:
        used, self.used = self.used, {}
        if used:
            with contextlib.suppress(AtollError):
                await asyncio.to_thread(Tokens(self._path).note_uses, used)

    def who(self, headers: Mapping[bytes, bytes], certificate: Mapping[str, Any] | None) -> Token:
        """Whose request this is. Raises `Unauthorized`."""
        shown = headers.get(b"authorization", b"").decode("latin-1")
        if shown:
            kind, _, secret = shown.partition(" ")
            if kind.lower() != "bearer":
                raise Unauthorized("the credentials can't be used", "they are no bearer token", _NEXT)
            token = self.tokens.of_bearer(secret.strip())
        elif certificate:
            subject = {name: value for part in certificate.get("subject", ()) for name, value in part}
            token = self.tokens.of_certificate(subject.get("commonName", ""), subject.get("serialNumber", ""))
        else:
            raise Unauthorized("the agent doesn't know who asks", "there is no token in the request", _NEXT)
        self.used[token.id] = time.time()
        self._was_used.set()
        return token


_NEXT = "Send `Authorization: Bearer TOKEN`; `atoll token create`, over there, makes one."


async def guard(connection: "ASGIConnection[Any, Any, Any, Any]", handler: BaseRouteHandler) -> None:
    """Raises `Unauthorized` or `Forbidden`."""
    state = connection.scope["state"]
    wanted = handler.opt.get("scope")
    state["call"], state["wanted"] = handler.name or getattr(handler, "operation_id", None) or "", wanted
    if wanted != PUBLIC:
        require(state, wanted)


def require(state: Any, wanted: Scope | None) -> None:
    """Raises `Unauthorized`, or `Forbidden` when who asks may less than that."""
    refusal: AtollError | None = state.get("refused")
    held = state.get("scope")
    if refusal is None and held is None:
        refusal = Unauthorized("the agent doesn't know who asks", next_step=_NEXT)
    elif refusal is None and wanted is None:
        refusal = Forbidden("nobody may do that", "it says nowhere who may")
    elif refusal is None and wanted is not None and not includes(held, wanted):
        refusal = Forbidden(
            f"the token '{state['principal']}' may not do that",
            f"it has the scope {held}, and this takes {wanted}",
            f"Ask for a token that has it: `atoll token create NAME --scope {wanted}`.",
        )
    if refusal is not None:
        state["refused"] = refusal
        raise refusal


def is_admin(state: Mapping[str, Any]) -> bool:
    return state.get("scope") == "admin"


class Door:
    """One way in, as an ASGI application around the other."""

    def __init__(self, app: Any, access: Access, via: Literal["local", "remote"]) -> None:
        self._app = app
        self._access = access
        self._via = via

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        state = scope.setdefault("state", {})
        state |= {"via": self._via, "principal": "nobody"}
        token = self._recognised(scope, state)
        answer = _Answer(self, scope, send)
        with self._access.serving(token) as serving:
            try:
                await self._app(scope, receive, answer.send)
                if answer.is_refusal:
                    # uvicorn takes a refused handshake for one that was forgotten, unless nobody waits for it any more.
                    raise ClientDisconnected
            except asyncio.CancelledError:
                if serving not in self._access.ended:
                    raise
                await answer.break_off()

    def _recognised(self, scope: Any, state: dict[str, Any]) -> Token | None:
        if self._via == "local":
            state |= {"principal": "local", "scope": "admin"}
            return None
        try:
            token = self._access.who(dict(scope["headers"]), state.get("certificate"))
        except AtollError as error:
            state["refused"] = error
            return None
        state |= {"principal": token.name, "scope": token.scope, "expires_at": token.expires_at}
        return token

    def note(self, scope: Any, status: int, headers: Mapping[bytes, bytes]) -> None:
        """Write it down, if it is a change, or a refusal."""
        state, method = scope["state"], scope.get("method", "")
        looks = method in ("GET", "HEAD", "OPTIONS") and state.get("wanted") in (None, "read", PUBLIC)
        if looks and status not in (401, 403):
            return
        client = scope.get("client")
        parameters = scope.get("path_params") or {}
        refused = state.get("refused") if status in (401, 403) else None
        entry = AuditEntry(
            at=time.time(),
            principal=state["principal"],
            via=self._via,
            address=state.get("address") or (str(client[0]).removeprefix("::ffff:") if client else ""),
            call=state.get("call") or scope.get("path", ""),
            subject=state.get("subject") or next((str(each) for each in parameters.values()), ""),
            task=headers.get(b"atoll-task", b"").decode("latin-1"),
            status=status,
            why=refused.text if isinstance(refused, AtollError) else "",
        )
        with contextlib.suppress(AtollError):
            (self._access.refused if status == 401 else self._access.audit).add(entry)


class _Answer:
    """What goes back: it is written down once it begins, and a WebSocket's refusal has its reason."""

    def __init__(self, door: Door, scope: Any, send: Any) -> None:
        self._door = door
        self._scope = scope
        self._send = send
        self._begun = False
        self.is_refusal = False
        """A WebSocket was refused."""

    async def send(self, message: Any) -> None:
        kind = message["type"]
        if kind == "websocket.close" and not self._begun:
            await self._refuse(message)
            return
        if not self._begun:
            self._begun = True
            status = message.get("status", 101)
            self._door.note(self._scope, status, dict(message.get("headers") or ()))
        await self._send(message)

    async def _refuse(self, message: Any) -> None:
        """A WebSocket that isn't accepted gets an answer of HTTP, with the problem."""
        state, reason = self._scope["state"], message.get("reason") or ""
        unknown = NotFound(f"there is no stream {self._scope['path']}", reason if "call" in state else "")
        problem = problem_of(state.get("refused") or unknown)
        headers = [(b"content-type", PROBLEM_TYPE.encode())]
        if problem.status == 401:
            headers.append((b"www-authenticate", b'Bearer realm="atoll"'))
        await self.send({"type": "websocket.http.response.start", "status": problem.status, "headers": headers})
        await self._send({"type": "websocket.http.response.body", "body": msgspec.json.encode(problem)})
        self.is_refusal = True

    async def break_off(self) -> None:
        if self._scope["type"] == "websocket" and self._begun:
            reason = "the token was revoked, or has expired"
            with contextlib.suppress(Exception):
                await self._send({"type": "websocket.close", "code": _ENDED, "reason": reason})
