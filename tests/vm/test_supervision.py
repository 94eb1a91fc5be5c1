"""The agent starts again what ended by itself, and leaves alone what somebody stopped."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest
from tests.helpers.agents import agent
from tests.helpers.images import adopt_cached

from atoll.errors import InvalidInput
from atoll.layout import Layout
from atoll.model.requests import SetRequest
from atoll.model.state import Phase
from atoll.model.vm import Event
from atoll.platform.local import LocalHost, LocalVm
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]


@pytest.fixture
async def host(layout: Layout) -> AsyncIterator[LocalHost]:
    """This computer, as who uses no agent sees it, so that nothing here helps the agent."""
    await adopt_cached("tiny", layout)
    async with LocalHost(layout) as opened:
        try:
            yield opened
        finally:
            for each in await opened.ls():
                await (await opened.get(each.vm.id)).rm(force=True)


def through_agent(layout: Layout) -> RemoteHost:
    return RemoteHost(Place(url="http://atoll", socket=str(layout.agent_socket)))


async def happened(host: LocalHost, kind: str, *, after: int = 0, seconds: float = 60) -> Event:
    """The first such event."""
    async with asyncio.timeout(seconds), contextlib.aclosing(host.events(after=after)) as events:  # type: ignore[type-var]
        async for event in events:
            if event.kind == kind:
                return event
    raise AssertionError(f"there was no {kind}")


async def kinds(host: LocalHost) -> list[str]:
    return [event.kind async for event in host.events(follow=False, after=0)]


async def pid_of(vm: LocalVm) -> int:
    run = (await vm.info()).vm.run
    assert run is not None
    return run.pid


async def test_a_killed_vm_is_started_again_and_a_stopped_one_is_not(host: LocalHost, layout: Layout) -> None:
    vm = await host.create("tiny", name="web", memory="96MiB", restart="on-failure")
    other = await host.create("tiny", name="db", memory="96MiB", restart="always")
    plain = await host.create("tiny", name="plain", memory="96MiB")
    async with agent(layout):
        for each in (vm, other, plain):
            await each.start()
        first = await pid_of(vm)
        os.kill(first, signal.SIGKILL)
        os.kill(await pid_of(plain), signal.SIGKILL)
        told = await happened(host, "vm.restarted")
        assert (told.name, told.data) == ("web", {"reason": "killed", "count": 1})
        assert await pid_of(vm) != first
        os.kill(await pid_of(vm), signal.SIGKILL)
        told = await happened(host, "vm.restarted", after=told.id)
        assert told.data["count"] == 2, "the runs were short, so the pause has doubled"

        await other.stop(force=True)
        os.kill(await pid_of(vm), signal.SIGKILL)
        await happened(host, "vm.ended", after=told.id)
        await vm.stop()
        await asyncio.sleep(5)
    phases = {each.vm.name: each.phase for each in await host.ls()}
    assert phases == dict.fromkeys(("web", "db", "plain"), Phase.STOPPED), "a stop also ends the waiting for a restart"


async def test_a_guest_that_powers_itself_off_returns_only_if_always_wanted(host: LocalHost, layout: Layout) -> None:
    always = await host.run("tiny", name="always", memory="96MiB", restart="always")
    failures = await host.run("tiny", name="failures", memory="96MiB", restart="on-failure")
    async with agent(layout):
        for each in (failures, always):
            await each.exec(["sh", "-c", "(sleep 0.2; poweroff -f) >/dev/null 2>&1 &"])
        told = await happened(host, "vm.restarted")
        assert (told.name, told.data["reason"]) == ("always", "guest-shutdown")
        await failures.wait("stopped", timeout=60)
        await asyncio.sleep(2)
    assert (await kinds(host)).count("vm.restarted") == 1


async def test_what_ended_while_no_agent_ran_is_dealt_with_when_one_starts(host: LocalHost, layout: Layout) -> None:
    vm = await host.run("tiny", name="web", memory="96MiB", restart="on-failure")
    gone = await host.run("tiny", name="gone", memory="96MiB", remove_when_stopped=True)
    for each in (vm, gone):
        os.kill(await pid_of(each), signal.SIGKILL)
    async with agent(layout):
        await happened(host, "vm.restarted")
        assert [each.vm.name for each in await host.ls()] == ["web"]


async def test_policies_are_told_changed_and_not_inherited(host: LocalHost, layout: Layout) -> None:
    vm = await host.create("tiny", name="web", memory="96MiB", restart="always", autostart=True, boot_order=3)
    clone = await host.clone("web", "copy")
    record = (await clone.info()).vm
    assert (record.restart, record.autostart, record.boot_order) == ("never", False, 0)
    changes = await vm.set(SetRequest(restart="never", boot_order=4))
    assert [(each.name, each.value, each.when) for each in changes] == [
        ("restart", "never", "now"),
        ("boot-order", "4", "now"),
    ]
    record = (await vm.info()).vm
    assert (record.restart, record.autostart, record.boot_order) == ("never", True, 4)
    with pytest.raises(InvalidInput, match="boot order"):
        await vm.set(SetRequest(boot_order=5000))
    with pytest.raises(InvalidInput, match="--rm and --restart"):
        await host.create("tiny", restart="always", remove_when_stopped=True)


async def test_a_throw_away_vm_is_removed_as_soon_as_it_ended(host: LocalHost, layout: Layout) -> None:
    vm = await host.run("tiny", name="gone", memory="96MiB", remove_when_stopped=True)
    async with agent(layout):
        os.kill(await pid_of(vm), signal.SIGKILL)
        await happened(host, "vm.removed", seconds=20)


async def test_a_guest_that_panicked_is_ended_and_started_again(host: LocalHost, layout: Layout) -> None:
    vm = await host.run("tiny", name="web", memory="96MiB", restart="on-failure")
    plain = await host.run("tiny", name="plain", memory="96MiB")
    async with agent(layout):
        for each in (vm, plain):
            await each.exec(["sh", "-c", "modprobe pvpanic_pci; echo 1 > /proc/sys/kernel/sysrq"])
            await each.exec(["sh", "-c", "(sleep 0.2; echo c > /proc/sysrq-trigger) >/dev/null 2>&1 &"])
        told = await happened(host, "vm.restarted")
        assert (told.name, told.data["reason"]) == ("web", "guest-panic")
        await vm.wait("ready", timeout=120)
    assert (await plain.info()).phase is Phase.CRASHED, "it can be looked at"
    assert (await kinds(host)).count("vm.panicked") == 2


async def test_what_qemu_reports_comes_within_50_ms(host: LocalHost, layout: Layout) -> None:
    vm = await host.run("tiny", name="web", memory="96MiB")
    delays: list[float] = []
    async with agent(layout), through_agent(layout) as reached:
        events = reached.events(follow=True)

        async def listen() -> None:
            async for event in events:
                delays.extend([time.time() - event.data["at"]] if event.kind in ("vm.halted", "vm.continued") else [])

        listening = asyncio.create_task(listen())
        await asyncio.sleep(1)
        for _ in range(10):
            await vm.pause()
            await vm.resume()
        async with asyncio.timeout(20):
            while len(delays) < 20:
                await asyncio.sleep(0.05)
        listening.cancel()
    print("from QEMU to a client, ms:", sorted(round(each * 1000) for each in delays))
    assert sorted(delays)[10] < 0.05


async def test_no_event_is_told_twice_or_lost_between_two_agents(host: LocalHost, layout: Layout) -> None:
    vm = await host.run("tiny", name="web", memory="96MiB")
    async with agent(layout) as served:
        await vm.pause()
        await happened(host, "vm.halted")
        await served.end(signal.SIGKILL)
    await vm.resume()
    async with agent(layout):
        told = await happened(host, "vm.continued")
        await vm.stop(force=True)
        await happened(host, "vm.shutdown", after=told.id)
    found = [each for each in await kinds(host) if each in ("vm.halted", "vm.continued", "vm.shutdown")]
    assert found == ["vm.halted", "vm.continued", "vm.shutdown"]
