"""Everybody who has no right to it is refused by a running agent, at every one of its routes."""

import asyncio
import re
import ssl
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from litestar.handlers import WebsocketRouteHandler
from litestar.routes import HTTPRoute
from msgspec.structs import replace
from tests.helpers.agents import remote_agent, trusting
from tests.helpers.command import atoll
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from atoll.agent import access as doors
from atoll.agent.access import PUBLIC, Access
from atoll.agent.app import make_app
from atoll.agent.handlers import Agent
from atoll.host import certificates
from atoll.layout import Layout
from atoll.model.spec import SeedSpec
from atoll.model.token import Scope
from atoll.platform.local import LocalHost
from atoll.store.audit import past
from atoll.store.sqlite import SqliteRecords
from atoll.store.tokens import Tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:litestar")


class Way(NamedTuple):
    """Something that can be asked for."""

    verb: str
    path: str
    scope: str | None


def ways(layout: Layout) -> Iterator[Way]:
    """All that there is in the application, whoever has put it there."""
    for route in make_app(Agent(LocalHost(layout), Access(layout))).routes:
        path = re.sub(r"\{\w+:int\}", "1", re.sub(r"\{\w+:str\}", "x", route.path))
        handlers: Any = route.route_handlers if isinstance(route, HTTPRoute) else [getattr(route, "route_handler")]  # noqa: B009
        for handler in handlers:
            verbs = ["WS"] if isinstance(handler, WebsocketRouteHandler) else sorted(handler.http_methods)
            for verb in verbs:
                yield Way(verb, path, handler.opt.get("scope"))


async def asked(client: httpx.AsyncClient, way: Way, token: str | None) -> int:
    """The status of the answer."""
    headers = {"Authorization": f"Bearer {token}".strip()} if token is not None else {}
    if way.verb != "WS":
        answer = await client.request(way.verb, way.path, headers=headers)
        if answer.status_code in (401, 403):
            assert answer.headers["content-type"] == "application/problem+json"
            if way.verb != "HEAD":
                assert answer.json()["code"] == {401: "unauthorized", 403: "forbidden"}[answer.status_code]
        assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
        return answer.status_code
    return await opened(client, way, client.tls, headers)  # type: ignore[attr-defined]


async def opened(client: httpx.AsyncClient, way: Way, tls: ssl.SSLContext, headers: dict[str, str]) -> int:
    """The status of a WebSocket's handshake."""
    url = str(client.base_url).replace("https", "wss").rstrip("/") + way.path
    try:
        async with connect(url, ssl=tls, additional_headers=headers):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


@pytest.fixture
async def client(layout: Layout) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks with an agent of the test's home; it trusts its authority."""
    async with remote_agent(layout) as url:
        tls = trusting(layout)
        async with httpx.AsyncClient(base_url=url, verify=tls, trust_env=False) as found:
            found.tls = tls  # type: ignore[attr-defined]
            yield found


async def test_whoever_has_no_right_is_refused_everywhere(client: httpx.AsyncClient, layout: Layout) -> None:
    tokens = Tokens(layout.tokens)
    _, revoked = tokens.create("revoked", scope="admin")
    tokens.rm("revoked")
    _, expired = tokens.create("expired", scope="admin", expires_in=0)
    _, join = tokens.create_join(scope="admin", expires_in=60, fingerprint="")
    _, read = tokens.create("read", scope="read")
    _, operate = tokens.create("operate", scope="operate")
    every = [each for each in ways(layout) if each.scope != PUBLIC]
    for way in every:
        for shown in (None, "", "nonsense", revoked, expired, join.rstrip(".")):
            assert await asked(client, way, shown) == 401, (way, shown)
        less = {"operate": read, "admin": operate}.get(way.scope or "", operate)
        if way.scope != "read":
            assert await asked(client, way, less) == 403, way
    assert {each.scope for each in every} == {"read", "operate", "admin", None}
    assert {each.verb for each in every if each.scope is None} == {"OPTIONS"}
    assert len(every) > 150


def test_little_is_for_everybody(layout: Layout) -> None:
    assert {each.path for each in ways(layout) if each.scope == PUBLIC} == {
        "/v1/ca.pem",
        "/v1/join",
        "/healthz",
        "/readyz",
    }


async def test_what_reaches_into_the_host_takes_an_admin(client: httpx.AsyncClient, layout: Layout) -> None:
    _, operate = Tokens(layout.tokens).create("operate", scope="operate")
    _, admin = Tokens(layout.tokens).create("admin", scope="admin")

    async def status(path: str, token: str, **body: Any) -> int:
        verb = "PATCH" if path.endswith("/x") else "POST"
        headers = {"Authorization": f"Bearer {token}"}
        return (await client.request(verb, path, json=body, headers=headers)).status_code

    share = {"host_path": "/etc", "guest_path": "/mnt"}
    for path, body in (
        ("/v1/vms", {"name": "web", "shares": [share], "image": "nix"}),
        ("/v1/vms", {"name": "web", "isolation": "none", "image": "nix"}),
        ("/v1/vms/x", {"isolation": "none"}),
        ("/v1/networks", {"name": "lan", "mode": "bridge", "bridge": "nix0"}),
    ):
        assert await status(path, operate, **body) == 403
        assert await status(path, admin, **body) not in (401, 403)
    _, read = Tokens(layout.tokens).create("read", scope="read")
    assert await status("/v1/vms/nix/wait", read, text="(a+)+$") == 403
    assert await status("/v1/vms/nix/wait", read, condition="ready") == 404


async def test_a_clients_certificate_counts_as_its_token(
    client: httpx.AsyncClient, layout: Layout, tmp_path: Path
) -> None:
    url, own = str(client.base_url), tmp_path / "ci.pem"
    atoll("token", "create", "ci", "--scope", "read", "--certificate", str(own))
    assert own.stat().st_mode & 0o777 == 0o600

    def with_certificate(path: Path) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=url, verify=trusting(layout, certificate=path), trust_env=False)

    async with with_certificate(own) as known:
        assert (await known.get("/v1/vms")).status_code == 200
        assert (await known.post("/v1/vms", json={})).status_code == 403
        Tokens(layout.tokens).rm("ci")
        assert (await known.get("/v1/vms")).status_code == 401

    # One that is good for longer than its token.
    token, _ = Tokens(layout.tokens).create("brief", scope="admin", expires_in=0)
    authority = certificates.authority(layout.credentials)
    (tmp_path / "brief.pem").write_bytes(certificates.client_certificate(authority, "brief", token.id))
    async with with_certificate(tmp_path / "brief.pem") as brief:
        for way in ways(layout):
            if way.scope != PUBLIC and way.verb != "WS":
                assert (await brief.request(way.verb, way.path)).status_code == 401, way

    foreign = certificates.authority(tmp_path / "foreign")
    (tmp_path / "foreign.pem").write_bytes(certificates.client_certificate(foreign, "ci", "1"))
    expired = certificates.client_certificate(certificates.authority(layout.credentials), "ci", "1", lifetime=-60)
    (tmp_path / "expired.pem").write_bytes(expired)
    # The agent's own certificate is one for servers.
    for refused in (tmp_path / "foreign.pem", tmp_path / "expired.pem", layout.server_certificate):
        async with with_certificate(refused) as unknown:
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                await unknown.get("/v1/ca.pem")


async def test_a_certificate_opens_no_stream_that_its_token_may_not(
    client: httpx.AsyncClient, layout: Layout, tmp_path: Path
) -> None:
    streams = [each for each in ways(layout) if each.verb == "WS"]
    assert len(streams) == 5
    authority, tokens = certificates.authority(layout.credentials), Tokens(layout.tokens)

    def shown(name: str, made: bytes) -> ssl.SSLContext:
        (tmp_path / f"{name}.pem").write_bytes(made)
        return trusting(layout, certificate=tmp_path / f"{name}.pem")

    def of_token(name: str, scope: Scope, *, expires_in: float | None = None) -> ssl.SSLContext:
        token, _ = tokens.create(name, scope=scope, expires_in=expires_in)
        return shown(name, certificates.client_certificate(authority, name, token.id))

    good, less = of_token("good", "operate"), of_token("less", "read")
    expired, revoked = of_token("expired", "admin", expires_in=0), of_token("revoked", "admin")
    tokens.rm("revoked")
    # The name of somebody else's token, with an id that isn't its own.
    other = shown("other", certificates.client_certificate(authority, "good", "0" * 12))
    foreign = shown("foreign", certificates.client_certificate(certificates.authority(tmp_path / "f"), "good", "1"))
    old = shown("old", certificates.client_certificate(authority, "good", "1", lifetime=-60))
    for way in streams:
        for tls, status in ((good, 101), (less, 403), (expired, 401), (revoked, 401), (other, 401)):
            assert await opened(client, way, tls, {}) == status, way
        # A token that is shown counts, not the certificate beside it.
        assert await opened(client, way, good, {"Authorization": "Bearer atoll.x.y"}) == 401, way
        for tls in (foreign, old):
            with pytest.raises((OSError, WebSocketException)) as caught:
                await opened(client, way, tls, {})
            assert not isinstance(caught.value, InvalidStatus)


async def test_a_key_is_its_owners_and_for_one_request(client: httpx.AsyncClient, layout: Layout) -> None:
    """Another one's key tells nothing of what he did, and the same key isn't used for something else."""
    ann, bob = (
        {"Authorization": f"Bearer {Tokens(layout.tokens).create(name, scope='operate')[1]}", "Idempotency-Key": "one"}
        for name in ("ann", "bob")
    )
    first = await client.post("/v1/groups", json={"name": "a"}, headers=ann)
    assert first.status_code == 200, first.text
    again = await client.post("/v1/groups", json={"name": "a"}, headers=ann)
    assert (again.headers["atoll-task"], again.json()) == (first.headers["atoll-task"], first.json())
    for verb, path, body in (
        ("POST", "/v1/groups", {"name": "b"}),
        ("POST", "/v1/groups", {"name": "a", "rules": ["allow in tcp 80 from any"]}),
        ("POST", "/v1/networks", {"name": "a"}),
        ("DELETE", "/v1/groups/a", None),
    ):
        refused = await client.request(verb, path, json=body, headers=ann)
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid-input"), (verb, path, refused.text)
        assert "was used for another request" in refused.text
    assert [each["name"] for each in (await client.get("/v1/groups", headers=ann)).json()] == ["a"]
    # Bob's is another one, though it reads the same: his request is done, for what it is.
    his = await client.post("/v1/groups", json={"name": "a"}, headers=bob)
    assert (his.status_code, his.json()["code"]) == (409, "already-exists")
    assert his.headers["atoll-task"] != first.headers["atoll-task"]
    assert (await client.get("/v1/tasks/one", headers=bob)).json()["id"] == his.headers["atoll-task"]


async def test_another_authority_isnt_trusted_and_old_tls_isnt_spoken(
    client: httpx.AsyncClient, layout: Layout, tmp_path: Path
) -> None:
    certificates.authority(tmp_path)
    other = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    old = trusting(layout)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    for context in (other, old):
        async with httpx.AsyncClient(base_url=client.base_url, verify=context, trust_env=False) as stranger:
            with pytest.raises(httpx.ConnectError):
                await stranger.get("/v1/ca.pem")


async def test_an_open_stream_ends_when_its_token_is_revoked(client: httpx.AsyncClient, layout: Layout) -> None:
    token, secret = Tokens(layout.tokens).create("ci", scope="read")
    headers = {"Authorization": f"Bearer {secret}"}
    async with asyncio.timeout(20), client.stream("GET", "/v1/events", headers=headers) as events:
        assert events.status_code == 200
        Tokens(layout.tokens).rm("ci")
        with pytest.raises(httpx.RemoteProtocolError):
            async for _ in events.aiter_bytes():
                pass
    url = str(client.base_url).replace("https", "wss") + "/v1/vms/x/shell"
    _, operate = Tokens(layout.tokens).create("ci", scope="operate", expires_in=5)
    async with (
        asyncio.timeout(20),
        connect(url, ssl=client.tls, additional_headers={"Authorization": f"Bearer {operate}"}) as shell,  # type: ignore[attr-defined]
    ):
        with pytest.raises(ConnectionClosed, match="has expired"):
            await shell.recv()
    assert token.id not in Tokens(layout.tokens).all()


async def test_tasks_are_seen_by_who_began_them(client: httpx.AsyncClient, layout: Layout) -> None:
    tokens = Tokens(layout.tokens)
    ann, bob, root = (
        {"Authorization": f"Bearer {tokens.create(name, scope=scope)[1]}"}
        for name, scope in (("ann", "operate"), ("bob", "operate"), ("root", "admin"))  # type: ignore[arg-type]
    )
    begun = await client.post("/v1/vms", json={"image": "nix"}, headers=ann | {"Idempotency-Key": "one"})
    task = begun.headers["atoll-task"]
    for headers, seen in ((ann, True), (bob, False), (root, True)):
        assert [each["id"] for each in (await client.get("/v1/tasks", headers=headers)).json()] == [task] * seen
        expected = 200 if seen else 404
        assert (await client.get(f"/v1/tasks/{task}", headers=headers)).status_code == expected
        assert (await client.get(f"/v1/tasks/{task}/events", headers=headers)).status_code == expected
        cancelled = await client.post(f"/v1/tasks/{task}/cancel", headers=headers)
        assert cancelled.status_code == (409 if seen else 404)
    assert (await client.get("/v1/tasks/one", headers=bob)).status_code == 404


async def test_who_did_what_is_written_down(client: httpx.AsyncClient, layout: Layout) -> None:
    _, secret = Tokens(layout.tokens).create("ann", scope="operate")
    headers = {"Authorization": f"Bearer {secret}"}
    await client.get("/v1/vms", headers=headers)
    await client.post("/v1/vms/web/start", headers=headers)
    await client.post("/v1/vms", json={"image": "nix", "password": "hunter2"}, headers=headers)
    await client.post("/v1/prune", headers=headers)
    await client.get("/v1/vms", headers={"Authorization": "Bearer hunter3"})
    atoll("rm", "web")
    found = past(layout.audit, layout.refused)
    assert [each.principal for each in past(layout.refused)] == ["nobody"]
    assert [(each.principal, each.via, each.call, each.subject, each.status) for each in found] == [
        ("ann", "remote", "vm.start", "web", 404),
        ("ann", "remote", "host.create", "", 404),
        ("ann", "remote", "host.prune", "", 403),
        ("nobody", "remote", "host.ls", "", 401),
    ]
    assert {each.address for each in found} == {"127.0.0.1"}
    written = layout.audit.read_text() + layout.refused.read_text()
    assert "hunter" not in written and secret.split(".")[2] not in written


async def test_who_only_looks_sees_no_secret(client: httpx.AsyncClient, layout: Layout) -> None:
    tokens = Tokens(layout.tokens)
    read, operate = (
        {"Authorization": f"Bearer {tokens.create(scope, scope=scope)[1]}"}
        for scope in ("read", "operate")  # type: ignore[arg-type]
    )
    made = await client.post("/v1/vms", json={"name": "web", "disks": [{"size": "1MiB"}]}, headers=operate)
    assert made.status_code == 200, made.text
    records = SqliteRecords(layout.database)
    (vm,) = records.vms()
    seed = SeedSpec(user="ann", password_hash="$6$hunter2", user_data="#!hunter3")
    records.put_vm(replace(vm, spec=replace(vm.spec, seed=seed)))
    (created,) = records.operations()
    records.put_operation(replace(created, request={"vm": msgspec.to_builtins(records.vms()[0])}))
    records.close()
    for path in ("/v1/vms", "/v1/vms/web", "/v1/operations", f"/v1/operations/{created.id}"):
        seen = (await client.get(path, headers=read)).text
        assert "ann" in seen and "hunter" not in seen, path
        assert "hunter2" in (await client.get(path, headers=operate)).text


async def test_a_token_revoked_while_nothing_can_be_watched_ends_what_it_serves(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, access = Tokens(layout.tokens), Access(layout)
    token, _ = tokens.create("ci", scope="read")
    watchable, told = doors.changes, []

    async def not_at_first(path: Path) -> AsyncIterator[None]:
        if not told:
            raise OSError("too many watches")
        async for each in watchable(path):
            yield each

    async def serve() -> None:
        with access.serving(token):
            await asyncio.Event().wait()

    monkeypatch.setattr(doors, "changes", not_at_first)
    monkeypatch.setattr(doors, "MISHAP_DELAY", 0.1)
    serving = asyncio.create_task(serve())
    watching = asyncio.create_task(access.watch(told.append))
    await asyncio.sleep(0)
    tokens.rm("ci")
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(serving, 30)
    assert told == ["Error: watching over the tokens: too many watches"]
    watching.cancel()
