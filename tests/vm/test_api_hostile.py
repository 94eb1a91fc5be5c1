"""Clients that mean harm: bodies, heads, paths, cursors that no program would send, and streams that nobody reads."""

import asyncio
import contextlib
import gzip
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from tests.helpers.agents import agent, remote_agent, trusting
from tests.helpers.api_client import api
from tests.helpers.images import adopt_cached
from tests.helpers.ports import free_port
from tests.vm.test_api_limits import answers_others, memory
from websockets.asyncio.client import unix_connect
from websockets.exceptions import ConnectionClosed

from atoll.layout import Layout
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place
from atoll.store.tokens import Tokens

pytestmark = pytest.mark.vm
MIB = 1 << 20
PATIENCE = 20.0
"""Seconds for others, on a computer that has much else to do: that they are answered at all while it goes on."""
JSON = {"Content-Type": "application/json"}
BODIES = {
    "deep lists": b'{"image":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"name":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "a long number": b'{"name":' + b"9" * 500_000 + b"}",
    "a huge number": b'{"name":1e999999}',
    "a size beyond all": b'{"name":"x","size":99999999999999999999999}',
    "a zero byte": b'{"name":"a\\u0000b","image":"a\\u0000b"}',
    "half a character": b'{"name":"\\ud800"}',
    "no text": b'{"name":"\xff\xfe"}',
    "compressed": gzip.compress(b'{"name":"x"}'),
    "a list": b"[]",
    "nothing": b"null",
}
PLACES = ("/v1/vms", "/v1/networks", "/v1/groups", "/v1/uploads", "/v1/exports", "/v1/images/import", "/v1/join")
CURSORS = ("nan~x", "inf~", "-inf~x", "1e400~x", "~", "x" * 5000, "1~" + "a" * 60_000, "0x1p3~", "\0~")
PATHS = (
    "/v1/uploads/..%2f..%2ftokens", "/v1/uploads/..", "/v1/exports/..%2f..%2f..%2f..%2fetc%2fpasswd", "/v1/vms/%00",
    "/v1/vms/..%2f..%2fetc", "/../../etc/passwd", "/v1/vms/%ff%fe", "/v1/vms/" + "a" * 60_000, "/v1/tasks/%00",
    "/v1/operations/%ff", "/v1/schema/../vms/..", "/v1/vms/x/connect/99999999999999999999", "*", "/" + "a" * 10_000_000,
)  # fmt: skip
HEADS = (
    "X: a\r\n" * 10_000,
    "Content-Length: -5\r\n",
    "Content-Length: 99999999999999999999999\r\n",
    "Content-Length: 5\r\nContent-Length: 6\r\n",
    "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    "If-Match: " + '"a",' * 5000 + "\r\n",
    "If-None-Match: \xff\xfe\r\n",
    "Idempotency-Key: " + "k" * 5000 + "\r\n",
    "Prefer: wait=99999999999999999999\r\n",
    "Authorization: Bearer " + "x" * 50_000 + "\r\n",
    "Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Version: 99\r\n",
    "Upgrade: h2c\r\nHTTP2-Settings: x\r\n",
)


async def raw(layout: Layout, said: str) -> int:
    """The status of the answer; 0 when the connection was closed without one."""
    reader, writer = await asyncio.open_unix_connection(layout.agent_socket)
    line = b""
    try:
        with contextlib.suppress(OSError):
            writer.write(said.encode("latin-1"))
            line = await asyncio.wait_for(reader.readline(), 30)
    finally:
        writer.close()
    return int(line.split()[1]) if line else 0


async def test_what_no_program_would_send_is_refused_as_that(layout: Layout, capfd: pytest.CaptureFixture[str]) -> None:
    async with agent(layout) as served, api(layout) as client:
        before = memory(served.pid)
        for place in PLACES:
            for label, body in BODIES.items():
                headers = JSON | ({"Content-Encoding": "gzip"} if label == "compressed" else {})
                refused = await client.post(place, content=body, headers=headers)
                assert 400 <= refused.status_code < 500, (place, label, refused.text)
                assert refused.headers["content-type"] == "application/problem+json", (place, label)
                assert len(refused.content) < 10_000, "it isn't told all again"
        for cursor in CURSORS:
            for place in ("/v1/vms", "/v1/tasks", "/v1/operations", "/v1/images"):
                answer = await client.get(place, params={"after": cursor})
                assert answer.status_code in (200, 400), (place, cursor[:20], answer.text)
        for place in ("/v1/events/past?after=99999999999999999999", "/v1/events?after=-1"):
            assert (await client.get(place)).status_code == 400, place
        for verb in ("GET", "HEAD", "DELETE"):
            for path in PATHS:
                status = await raw(layout, f"{verb} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                # What removes an upload that isn't there has nothing to do.
                assert status == 0 or 400 <= status < 500 or (verb, status) == ("DELETE", 204), (
                    verb,
                    path[:50],
                    status,
                )
        for head in HEADS:
            status = await raw(layout, f"POST /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n")
            assert status == 0 or 400 <= status < 500, (head[:50], status)
        assert (await client.get("/v1/vms")).json() == []
        assert memory(served.pid) - before < 64 * MIB
    assert "Traceback" not in capfd.readouterr().err, "strangers don't fill its log"


@pytest.mark.slow
async def test_silent_strangers_cost_little(layout: Layout) -> None:
    port = free_port()
    async with agent(layout, "--listen", f"127.0.0.1:{port}") as served:
        before = memory(served.pid)
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(400)]
        whole = [
            await asyncio.open_connection("127.0.0.1", port, ssl=trusting(layout), server_hostname="127.0.0.1")
            for _ in range(100)
        ]
        await answers_others(layout, 1.0, within=PATIENCE)
        assert memory(served.pid) - before < 90 * MIB, "with asyncio's own buffers they would be 150"
        # They are cut off: first those that never say who they are.
        async with asyncio.timeout(60):
            for reader, _ in (*silent, *whole):
                with contextlib.suppress(OSError):
                    assert await reader.read() == b""
        for _, writer in (*silent, *whole):
            writer.close()


async def test_a_token_counts_in_its_header_only(layout: Layout) -> None:
    async with remote_agent(layout) as url:
        _, secret = Tokens(layout.tokens).create("ops", scope="admin")
        async with httpx.AsyncClient(base_url=url, verify=trusting(layout), trust_env=False) as client:
            for name in ("token", "access_token", "authorization"):
                assert (await client.get("/v1/vms", params={name: secret})).status_code == 401
            for headers in ({"Cookie": f"token={secret}"}, {"X-Api-Key": secret}, {"Authorization": f"Basic {secret}"}):
                assert (await client.get("/v1/vms", headers=headers)).status_code == 401, headers
            assert (await client.get("/v1/vms", headers={"Authorization": f"Bearer {secret}"})).status_code == 200


@pytest.fixture
async def busy_guest(layout: Layout) -> AsyncIterator[tuple[int, RemoteHost]]:
    """An agent's process, and a way to it; `web` runs there."""
    await adopt_cached("tiny", layout)
    place = Place(url="http://atoll", socket=str(layout.agent_socket))
    async with agent(layout) as served, RemoteHost(place) as host:
        vm = await host.run("tiny", name="web", memory="128MiB")
        try:
            yield served.pid, host
        finally:
            await vm.rm(force=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_who_never_reads_doesnt_fill_the_agents_memory(
    busy_guest: tuple[int, RemoteHost], layout: Layout
) -> None:
    pid, host = busy_guest
    before = memory(pid)
    async with contextlib.AsyncExitStack() as stack:
        # One of the four streams of a guest is left for those who read.
        for way, argv in (("exec", '"yes"'), ("exec", '"cat", "/dev/zero"'), ("exec", '"yes"'), ("shell", '"yes"')):
            opening = f'{{"command": [{argv}]}}' if way == "shell" else f'{{"command": {{"argv": [{argv}]}}}}'
            socket = await unix_connect(str(layout.agent_socket), uri=f"ws://atoll/v1/vms/web/{way}", max_queue=1)
            stack.callback(socket.transport.abort)
            await socket.send(opening)
            socket.transport.pause_reading()
        async with api(layout) as client:
            for _ in range(100):
                _reader, writer = await asyncio.open_unix_connection(layout.agent_socket, limit=1)
                stack.callback(writer.close)
                writer.write(b"GET /v1/events?after=0 HTTP/1.1\r\nHost: x\r\n\r\n")
            for count in range(300):
                await client.post("/v1/groups", json={"name": f"g{count}"})
        await answers_others(layout, 5.0, within=PATIENCE)
        assert memory(pid) - before < 150 * MIB
    vm = await host.get("web")
    async with asyncio.timeout(60):
        while re.search(r"\b(yes|zero)\b", (await vm.exec(["ps"])).text):
            await asyncio.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_messages_without_end_are_cut_off(busy_guest: tuple[int, RemoteHost], layout: Layout) -> None:
    pid, _ = busy_guest
    before = memory(pid)

    async def flood(path: str, opening: str | None) -> None:
        async with unix_connect(str(layout.agent_socket), uri=f"ws://atoll{path}") as socket:
            if opening is not None:
                await socket.send(opening)
            with contextlib.suppress(ConnectionClosed):
                await socket.send(bytes(64 * MIB))
                await socket.recv()
            # 1009, or that no opening came in time.
            with pytest.raises(ConnectionClosed):
                while True:
                    await socket.recv()

    asked = '{"command": {"argv": ["sleep", "1000"]}, "stdin": true}'
    async with asyncio.TaskGroup() as floods:
        for _ in range(5):
            floods.create_task(flood("/v1/vms/web/exec", asked))
            floods.create_task(flood("/v1/vms/web/exec", None))
        await answers_others(layout, 3.0, within=PATIENCE)
    assert memory(pid) - before < 150 * MIB


def trickled(verb: str, path: str, **headers: str) -> bytes:
    """The head of a request whose body won't come."""
    told = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{verb} {path} HTTP/1.1\r\nHost: x\r\n{told}".encode()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_bodies_and_websockets_that_trickle_hold_nothing_but_their_connection_and_not_for_long(
    layout: Layout,
) -> None:
    async with agent(layout) as served, api(layout) as client:
        upload = (await client.post("/v1/uploads", json={"size": 1000})).json()["id"]
        long = {"Content_Length": "100000", "Content_Type": "application/octet-stream"}
        body = {"Content_Length": "100000", "Content_Type": "application/json"}
        stream = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"}
        stream |= {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        # What is sent at once, and how its answers may begin.
        kinds = (
            (trickled("POST", "/v1/vms", **body) + b"\r\n{", {408}),
            (trickled("POST", "/v1/import?name=x", **long) + b"\r\n", {408, 422}),
            (trickled("PATCH", f"/v1/uploads/{upload}", Upload_Offset="0", **long) + b"\r\n", {408, 409}),
            # The head of the handshake, and then the first message, of which only the length is told.
            (trickled("GET", "/v1/vms/web/exec", **stream), {0}),
            (trickled("GET", "/v1/vms/web/exec", **stream) + b"\r\n\x81\xfe\x40\x00abcd", {101}),
        )
        before = memory(served.pid)

        async def trickle(writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while True:
                    await asyncio.sleep(1)
                    writer.write(b"x")
                    await writer.drain()

        async def one(said: bytes, statuses: set[int]) -> None:
            reader, writer = await asyncio.open_unix_connection(layout.agent_socket)
            writer.write(said)
            trickling = asyncio.create_task(trickle(writer))
            line = b""
            with contextlib.suppress(OSError):
                line = await reader.readline()
                while await reader.read(1 << 16):
                    pass
            trickling.cancel()
            writer.close()
            assert (int(line.split()[1]) if line else 0) in statuses, (said[:30], line)

        async with asyncio.timeout(150), asyncio.TaskGroup() as clients:
            for _ in range(20):
                for said, statuses in kinds:
                    clients.create_task(one(said, statuses))
            await answers_others(layout, 5.0, within=PATIENCE)
        assert memory(served.pid) - before < 64 * MIB
        assert (await client.get("/v1/vms")).json() == []
        # What came of the upload is kept, and it can go on.
        kept = int((await client.head(f"/v1/uploads/{upload}")).headers["upload-offset"])
        more = {"Upload-Offset": str(kept), "Content-Type": "application/octet-stream"}
        rest = await client.patch(f"/v1/uploads/{upload}", content=bytes(1000 - kept), headers=more)
        assert rest.status_code == 204, rest.text


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_ten_thousand_handshakes_that_never_end(layout: Layout) -> None:
    port = free_port()
    async with agent(layout, "--listen", f"127.0.0.1:{port}") as served:
        before = memory(served.pid)
        made = []
        for _ in range(10_000):
            made.append(await asyncio.open_connection("127.0.0.1", port))  # noqa: PERF401
        await answers_others(layout, 3.0, within=PATIENCE)
        assert memory(served.pid) - before < 1024 * MIB
        for _, writer in made:
            writer.close()
        await answers_others(layout, 1.0, within=PATIENCE)
