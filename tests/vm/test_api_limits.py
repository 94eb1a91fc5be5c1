"""Clients that ask too much, are slow, or talk nonsense: the agent stays up, and answers others in time."""

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tests.helpers.agents import Served, agent
from tests.helpers.api_client import api
from tests.helpers.ports import free_port
from websockets.asyncio.client import unix_connect
from websockets.exceptions import InvalidStatus, WebSocketException

from atoll.layout import Layout

pytestmark = pytest.mark.vm
IN_TIME = 1.0
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def served(layout: Layout) -> AsyncIterator[Served]:
    async with agent(layout) as made:
        yield made


async def answers_others(layout: Layout, seconds: float = 3.0, *, within: float = IN_TIME) -> None:
    """Each of some requests, on connections of their own, is answered in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        async with api(layout) as client:
            begun = time.monotonic()
            assert (await client.get("/v1/vms")).status_code == 200
            assert time.monotonic() - begun < within
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def connections(layout: Layout, count: int) -> AsyncIterator[list[Connection]]:
    made: list[Connection] = []
    try:
        for _ in range(count):
            made.append(await asyncio.open_unix_connection(layout.agent_socket))  # noqa: PERF401
        yield made
    finally:
        for _, writer in made:
            writer.close()


def memory(pid: int) -> int:
    resident = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(resident) * os.sysconf("SC_PAGE_SIZE")


async def test_heads_that_never_end_are_cut_off(served: Served, layout: Layout) -> None:
    async def dribble(writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /v1/vms HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(0.5)
                writer.write(b"X-A: b\r\n")
                await writer.drain()

    async with connections(layout, 100) as slow:
        begun = time.monotonic()
        dribbling = [asyncio.create_task(dribble(writer)) for _, writer in slow]
        await answers_others(layout)
        async with asyncio.timeout(30):
            for reader, _ in slow:
                with contextlib.suppress(OSError):
                    await reader.read()
        assert 5 < time.monotonic() - begun < 20
        for each in dribbling:
            each.cancel()
        await asyncio.gather(*dribbling, return_exceptions=True)


async def test_heads_that_are_too_long_and_what_is_no_http_are_cut_off(served: Served, layout: Layout) -> None:
    nonsense = [
        b"GET /v1/vms HTTP/1.1\r\nX: " + b"a" * (1 << 20),
        b"GET /" + b"a" * (1 << 20),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        os.urandom(4096),
        b"\r\n" * 100_000,
    ]
    async with connections(layout, len(nonsense)) as made:
        for (reader, writer), said in zip(made, nonsense, strict=True):
            with contextlib.suppress(OSError):
                writer.write(said)
                await asyncio.wait_for(reader.read(), 20)
    await answers_others(layout, 0.5)


async def test_a_body_of_a_gigabyte_is_refused_without_being_kept(served: Served, layout: Layout) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 1 << 30:
            yield b" " * (1 << 20)
            sent += 1 << 20

    before = memory(served.pid)
    async with api(layout) as client:
        sending = asyncio.create_task(
            client.post("/v1/vms", content=body(), headers={"Content-Type": "application/json"})
        )
        await answers_others(layout, 1.0)
        with contextlib.suppress(httpx.WriteError):
            assert (await sending).status_code == 413
    assert memory(served.pid) - before < 64 << 20


async def test_who_sends_too_many_requests_is_told_so(layout: Layout) -> None:
    async with agent(layout, "--rate", "5"), api(layout) as client:
        answers = [await client.get("/v1/vms") for _ in range(20)]
        refused = [each for each in answers if each.status_code == 429]
        assert 5 <= len(refused) <= 10
        assert (refused[0].headers["retry-after"], refused[0].json()["code"]) == ("1", "too-many")
        await asyncio.sleep(1.1)
        assert (await client.get("/v1/vms")).status_code == 200


async def test_many_websockets_leave_room_for_others(served: Served, layout: Layout) -> None:
    refused = 0
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(520):
            try:
                socket = await stack.enter_async_context(
                    unix_connect(str(layout.agent_socket), uri="ws://atoll/v1/vms/none/exec")
                )
            except InvalidStatus:
                refused += 1
                continue
            with contextlib.suppress(WebSocketException):
                await socket.send(b"x" * 100_000)
        await answers_others(layout, 2.0)
    # Those that were accepted end by themselves, since what they say is no opening.
    assert refused <= 20


async def test_nonsense_in_place_of_tls_and_slow_handshakes_disturb_nobody(layout: Layout) -> None:
    port = free_port()
    async with agent(layout, "--listen", f"127.0.0.1:{port}"):
        nonsense = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(70_000), os.urandom(4096), b""]
        made = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        for (_, writer), said in zip(made, nonsense * 25, strict=True):
            with contextlib.suppress(OSError):
                writer.write(said)
                await writer.drain()
        await answers_others(layout, 1.0)
        untrusting = httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=False)
        async with untrusting as client:
            begun = time.monotonic()
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/v1/vms")).status_code == 401
            assert time.monotonic() - begun < 2 * IN_TIME
        for _, writer in made:
            writer.close()


@pytest.mark.slow
async def test_ten_thousand_idle_connections(served: Served, layout: Layout) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    try:
        async with connections(layout, 10_000):
            await answers_others(layout, 5.0)
        await answers_others(layout, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
