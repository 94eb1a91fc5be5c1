"""Equal pages of guests are merged while an agent was asked for it."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator

import pytest
from tests.helpers.agents import agent
from tests.helpers.api_client import api
from tests.helpers.images import adopt_cached

from atoll.host import page_merging
from atoll.host.page_merging import KSM, merged_of
from atoll.layout import Layout
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (KSM / "run").exists(), reason="this kernel can't merge equal pages (CONFIG_KSM)"),
    pytest.mark.skipif(not os.access(KSM / "run", os.W_OK), reason="only root may switch page merging on"),
]
MIB = 1 << 20
SAME = random.Random(1).randbytes(48 * MIB)
"""No page of it is like another one; each guest gets it."""
OF_IDLE_GUESTS = 60 * MIB
"""More than guests have in common that do nothing."""


def settings() -> dict[str, str]:
    return {name: (KSM / name).read_text() for name in ("advisor_mode", "run") if (KSM / name).exists()}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[dict[str, str]]:
    """The computer's settings, which it has again afterwards whatever becomes of the test."""
    before = settings()
    yield before
    if settings() != before:
        for name, value in before.items():
            (KSM / name).write_text(value.partition("[")[2].partition("]")[0] or value)


async def test_equal_memory_is_merged_but_for_strict_guests(layout: Layout, as_before: dict[str, str]) -> None:
    await adopt_cached("tiny", layout)
    place = Place(url="http://atoll", socket=str(layout.agent_socket))
    async with agent(layout, "--merge-pages"), RemoteHost(place) as host, api(layout) as client:
        assert (await host.memory()).merging
        levels = {"one": "standard", "two": "standard", "apart": "strict"}
        pids = {}
        for name, level in levels.items():
            vm = await host.run("tiny", name=name, memory="256MiB", isolation=level)
            run = (await vm.info()).vm.run
            assert run is not None
            pids[name] = run.pid
            assert (await vm.exec(["sh", "-c", "cat >/dev/shm/same"], stdin=SAME)).exit_code == 0
        async with asyncio.timeout(240):
            while min(merged_of(pids[name]) for name in ("one", "two")) < len(SAME) + OF_IDLE_GUESTS // 3:
                await asyncio.sleep(0.5)
        assert merged_of(pids["apart"]) == 0
        now = await host.memory()
        # Each page of it is there once for two of them; the strict one keeps its own.
        assert len(SAME) < now.merged < len(SAME) + 2 * OF_IDLE_GUESTS
        told = (await client.get("/metrics")).text
        assert "atoll_host_memory_merge_enabled 1" in told
        assert (
            f'atoll_vm_memory_merged_bytes{{vm="apart",id="{(await (await host.get("apart")).info()).vm.id}"}} 0'
            in told
        )
        for name in levels:
            same = await (await host.get(name)).exec(["cmp", "-", "/dev/shm/same"], stdin=SAME)
            assert same.exit_code == 0, same.stdout
            await (await host.get(name)).rm(force=True)
    assert settings() == as_before


async def test_the_next_agent_puts_back_what_a_killed_one_left_on(layout: Layout, as_before: dict[str, str]) -> None:
    async with agent(layout, "--merge-pages") as served:
        assert page_merging.merged().on
        await served.end(signal.SIGKILL)
    assert page_merging.merged().on
    async with agent(layout):
        assert settings() == as_before
