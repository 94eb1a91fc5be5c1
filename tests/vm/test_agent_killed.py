"""The agent is killed again and again while clients change fifty VMs through it. Takes some minutes."""

import asyncio
import contextlib
import random
import signal
from collections import Counter
from typing import Any

import pytest
from tests.helpers.agents import agent
from tests.helpers.machines import Factory
from tests.helpers.world import disagreements

from atoll.errors import AtollError
from atoll.layout import Layout
from atoll.model.requests import SetRequest
from atoll.model.vm import Vm
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(1500)]

CROWD, KILLS, CLIENTS = 50, 20, 6
LEFT_ALONE = 25
"""VMs that run and that nobody asks to do anything."""


async def one_change(host: RemoteHost, name: str, chance: random.Random) -> str:
    """Something that changes a VM's state, whatever it is in."""
    vm = await host.get(name)
    verb = chance.choice(("start", "stop", "pause", "resume", "set", "snapshot", "clone", "rename"))
    match verb:
        case "stop":
            await vm.stop(force=True)
        case "set":
            await vm.set(SetRequest(labels={"turn": str(chance.random())}))
        case "snapshot":
            await vm.forget((await vm.snapshot(disk_only=True)).name)
        case "clone":
            await (await host.clone(name)).rm(force=True)
        case "rename":
            await vm.rename(f"{name}-x")
            await vm.rename(name)
        case _:
            await getattr(vm, verb)()
    return verb


async def a_client(layout: Layout, names: list[str], seed: int, over: asyncio.Event, told: Counter[str]) -> None:
    """Changes one VM after the other, and comes again when the agent has gone."""
    chance = random.Random(seed)
    while not over.is_set():
        host = RemoteHost(Place(url="http://atoll", socket=str(layout.agent_socket)))
        async with host:
            with contextlib.suppress(AtollError):
                told[await one_change(host, chance.choice(names), chance)] += 1
                continue
        told["refused or cut off"] += 1
        await asyncio.sleep(0.05)


async def identity(vm: Any, record: Vm) -> tuple[int, int, str]:
    """Of its QEMU and of its guest's boot."""
    assert record.run is not None
    boot = (await vm.exec(["cat", "/proc/sys/kernel/random/boot_id"])).text
    return record.run.pid, record.run.start_time, boot


async def test_killing_the_agent_under_load_loses_nothing_and_touches_no_vm(factory: Factory) -> None:
    layout = factory.layout
    first = await factory.run("tiny", name="v0", memory="96MiB")
    alone = [first, *await first.fork(LEFT_ALONE - 1, name="v{n}")]
    changing = [f"c{number}" for number in range(CROWD - LEFT_ALONE)]
    for name in changing:
        await factory.host.create("tiny", name=name, memory="64MiB")
    before = {vm.name: await identity(vm, factory.machine(vm).record) for vm in alone}  # type: ignore[arg-type]

    over, told = asyncio.Event(), Counter[str]()
    share = len(changing) // CLIENTS
    clients = [
        # Two clients have each VM, so they also meet.
        asyncio.create_task(a_client(layout, changing[number // 2 * 2 * share :][: 2 * share], number, over, told))
        for number in range(CLIENTS)
    ]
    chance = random.Random(1)
    for _ in range(KILLS):
        async with agent(layout) as served:
            await asyncio.sleep(chance.uniform(0.5, 4))
            await served.end(signal.SIGKILL)
    over.set()
    await asyncio.gather(*clients)
    print("what the clients did:", dict(told))
    assert sum(told.values()) - told["refused or cut off"] > KILLS, "there was load"

    async with agent(layout):
        async with asyncio.timeout(60):
            while await factory.host.operations.ls(unfinished=True):
                await asyncio.sleep(0.2)
        states = Counter(each.state for each in await factory.host.operations.ls())
        print("operations:", dict(states))
        assert set(states) <= {"done", "undone"}
        after = {vm.name: await identity(vm, factory.machine(vm).record) for vm in alone}  # type: ignore[arg-type]
        assert after == before
        listed = {each.vm.name.removesuffix("-x") for each in await factory.host.ls()}
        assert set(changing) | set(before) <= listed
        assert await factory.host.fsck() == []
    assert await disagreements(layout) == []
