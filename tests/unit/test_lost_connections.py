"""What goes on through a connection that is cut, and what is told where nothing can."""

import asyncio
import contextlib
import hashlib
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.helpers.agents import Served, agent
from tests.helpers.ports import free_port
from tests.helpers.proxy import Proxy, proxy_to
from tests.helpers.web import Site, serving

from atoll.errors import NetworkFailed
from atoll.layout import Layout
from atoll.model.operation import Progress
from atoll.model.requests import CreateRequest, DiskRequest, PullRequest
from atoll.platform import reach
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place
from atoll.store.tokens import Tokens

SlowImage = contextlib.AbstractContextManager[tuple[Site, PullRequest]]


class World:
    """An agent, a proxy before it, and a host that is reached through that."""

    def __init__(self, served: Served, port: int, proxy: Proxy, host: RemoteHost) -> None:
        self.served = served
        self.port = port
        self.proxy = proxy
        self.host = host


@pytest.fixture
async def world(layout: Layout) -> AsyncIterator[World]:
    port = free_port()
    async with agent(layout, "--listen", f"127.0.0.1:{port}") as served, proxy_to(f"https://127.0.0.1:{port}") as proxy:
        _, secret = Tokens(layout.tokens).create("ci", scope="admin")
        place = Place(url=proxy.url, token=secret, tls=reach.tls_context(layout.credentials / "ca.pem"))
        async with RemoteHost(place) as host:
            yield World(served, port, proxy, host)


@pytest.fixture
def slow_image(tmp_path: Path) -> SlowImage:
    """An image that comes at once but for its end, which comes when the site is told to go on."""
    file = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", file, "1M"], check=True)
    content = file.read_bytes()
    site = Site(files={"/disk.qcow2": content}, stalls_after=[len(content) // 2])

    @contextlib.contextmanager
    def served() -> Iterator[tuple[Site, PullRequest]]:
        with serving(site):
            digest = hashlib.sha256(content).hexdigest()
            yield site, PullRequest(source=f"{site.url}/disk.qcow2", name="slow", checksum=f"sha256:{digest}")

    return served()


async def until_asked(site: Site) -> None:
    async with asyncio.timeout(20):
        while not site.asked:
            await asyncio.sleep(0.02)


async def cut_for(proxy: Proxy, seconds: float) -> None:
    await proxy.cut()
    await asyncio.sleep(seconds)
    await proxy.mend()


async def test_what_only_looks_is_asked_again(world: World) -> None:
    assert await world.host.ls() == []
    for _ in range(3):
        await cut_for(world.proxy, 0)
        assert await world.host.ls() == []


@pytest.mark.parametrize("progress", [False, True])
async def test_a_change_is_found_again_and_done_once(world: World, progress: bool, slow_image: SlowImage) -> None:
    told: list[Progress] = []
    with slow_image as (site, request):
        pulling = asyncio.create_task(world.host.images.pull(request, report=told.append if progress else None))
        await until_asked(site)
        await cut_for(world.proxy, 0.5)
        await asyncio.sleep(0.5)
        assert not pulling.done()
        site.resume.set()
        image = await asyncio.wait_for(pulling, 60)
    assert image.name == "slow:latest"
    assert [each.name for each in await world.host.images.ls()] == ["slow:latest"]
    assert bool(told) == progress


async def test_a_change_whose_agent_was_killed_is_told(world: World, layout: Layout, slow_image: SlowImage) -> None:
    assert await world.host.ls() == []
    with slow_image as (site, request):
        pulling = asyncio.create_task(world.host.images.pull(request))
        await until_asked(site)
        await world.served.end(signal.SIGKILL)
        async with agent(layout, "--listen", f"127.0.0.1:{world.port}"):
            with pytest.raises(NetworkFailed, match="operation ls"):
                await asyncio.wait_for(pulling, 60)


async def test_an_end_that_is_for_good_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "RECONNECT", 1.0)
    assert await world.host.ls() == []
    events = world.host.events(follow=True)
    following = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.5)
    await world.proxy.cut()
    with pytest.raises(NetworkFailed, match="atoll serve"):
        await asyncio.wait_for(following, 10)
    with pytest.raises(NetworkFailed, match="can't be reached"):
        await world.host.ls()


async def test_events_that_came_meanwhile_are_told_once(world: World, layout: Layout) -> None:
    seen: list[str] = []

    async def follow() -> None:
        async for event in world.host.events(follow=True):
            seen.append(f"{event.kind} {event.name}")  # noqa: PERF401  # it never ends

    following = asyncio.create_task(follow())
    place = Place(url="http://atoll", socket=str(layout.agent_socket))
    async with RemoteHost(place) as near:
        await asyncio.sleep(1)
        # Before the first event, and between two of them.
        for name in ("one", "two", "three"):
            await world.proxy.cut()
            await near.create(CreateRequest(name=name, disks=(DiskRequest(size="1MiB"),)))
            await world.proxy.mend()
            async with asyncio.timeout(20):
                while f"vm.created {name}" not in seen:
                    await asyncio.sleep(0.1)
    following.cancel()
    assert seen == ["vm.created one", "vm.created two", "vm.created three"]
