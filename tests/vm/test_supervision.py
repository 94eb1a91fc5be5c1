"""The agent starts again what ended by itself, and leaves alone what somebody stopped."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from tests.helpers import tool
from tests.helpers.agents import agent
from tests.helpers.images import adopt_cached

from atoll.errors import InvalidInput, WrongState
from atoll.layout import Layout
from atoll.model.requests import SetRequest
from atoll.model.state import Phase
from atoll.model.task import Task
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def in_another_boot(layout: Layout) -> None:
    """As if the computer had been started since an agent ran last."""
    layout.booted.write_text("another boot")


async def test_a_boot_starts_what_is_marked_in_its_order(host: LocalHost, layout: Layout) -> None:
    for name, number in (("web", 20), ("db", 10), ("cache", 10)):
        await host.create("tiny", name=name, memory="96MiB", autostart=True, boot_order=number)
    await host.create("tiny", name="idle", memory="96MiB", restart="always")
    async with agent(layout):
        async with asyncio.timeout(120):
            while not layout.booted.exists():
                await asyncio.sleep(0.1)
        started = [event.name async for event in host.events(follow=False, after=0) if event.kind == "vm.autostarted"]
        assert set(started[:2]) == {"db", "cache"} and started[2:] == ["web"]
        infos = {each.vm.name: each for each in await host.ls()}
        assert infos["idle"].phase is Phase.STOPPED
        ready = [await (await host.get(name)).exec(["cat", "/proc/uptime"]) for name in ("db", "cache")]
        assert all(each.exit_code == 0 for each in ready)
        await (await host.get("web")).stop(force=True)
    async with agent(layout):
        await asyncio.sleep(2)
        phases = {each.vm.name: each.phase for each in await host.ls()}
        assert phases["web"] is Phase.STOPPED, "it is the same boot"
    in_another_boot(layout)
    last = host._services.records.last_event()
    async with agent(layout):
        assert (await happened(host, "vm.autostarted", after=last)).name == "web"
        await (await host.get("web")).wait("ready", timeout=120)


@pytest.mark.slow
async def test_what_went_down_with_the_computer_returns_where_wanted(host: LocalHost, layout: Layout) -> None:
    for name, policy in (("web", "on-failure"), ("plain", "never")):
        vm = await host.run("tiny", name=name, memory="96MiB", restart=policy)
        os.kill(await pid_of(vm), signal.SIGKILL)
        record = vm._record()
        assert record.run is not None
        # No test starts the computer anew: the record is as it would be after that.
        vm._services.records.put_vm(replace(record, run=replace(record.run, boot_id="the boot before")))
        layout.vm(vm.id).qemu_log.write_text("")
    async with agent(layout):
        told = await happened(host, "vm.autostarted")
        assert told.name == "web"
        await (await host.get("web")).wait("ready", timeout=120)
    infos = {each.vm.name: each for each in await host.ls()}
    assert infos["plain"].phase is Phase.STOPPED
    assert infos["plain"].exit is not None and infos["plain"].exit.reason == "host-rebooted"


async def test_an_operation_of_a_killed_command_is_settled_at_once(host: LocalHost, layout: Layout) -> None:
    async with agent(layout):
        for point, outcome in ((("create", "files", "after"), "undone"), (("create", "tell", "before"), "undone")):
            before = [event.id async for event in host.events(follow=False, after=0)]
            code, _ = await asyncio.to_thread(
                tool.run, layout, "await host.create('tiny', name='v', memory='96MiB')", kill_at=point
            )
            assert code == -signal.SIGKILL
            told = await happened(host, f"operation.{outcome}", after=max(before, default=0), seconds=10)
            assert told.data["verb"] == "create"
            assert await host.operations.ls(unfinished=True) == []
        assert await host.ls() == []


async def test_a_killed_stop_of_a_throw_away_vm_is_finished_and_the_vm_removed(host: LocalHost, layout: Layout) -> None:
    await host.run("tiny", name="gone", memory="96MiB", remove_when_stopped=True)
    async with agent(layout):
        action = "await (await host.get('gone')).stop(force=True)"
        await asyncio.to_thread(tool.run, layout, action, kill_at=("stop", "record", "after"))
        await happened(host, "vm.removed", seconds=20)


async def test_a_shutdown_stops_all_in_reverse_and_the_boot_brings_back_what_is_wanted(
    host: LocalHost, layout: Layout
) -> None:
    await host.run("tiny", name="db", memory="96MiB", restart="on-failure", boot_order=1)
    await host.run("tiny", name="web", memory="96MiB", restart="never", boot_order=2)
    crashed = await host.run("tiny", name="crashed", memory="96MiB", restart="on-failure")
    async with agent(layout), through_agent(layout) as reached:
        os.kill(await pid_of(crashed), signal.SIGKILL)
        await happened(host, "vm.ended")
        done = await reached.stop_all(timeout=60, for_shutdown=True)
        assert [(each.name, each.outcome) for each in done] == [("web", "stopped"), ("db", "stopped")]
        await asyncio.sleep(3)
        infos = {each.vm.name: each for each in await host.ls()}
        assert {each.phase for each in infos.values()} == {Phase.STOPPED}, (
            "nothing returns while the computer goes down"
        )
        assert {each.exit.reason for each in infos.values() if each.exit} == {"host-shutdown"}
    in_another_boot(layout)
    async with agent(layout):
        names = set()
        async with asyncio.timeout(60):
            async for event in host.events(after=0):
                if event.kind == "vm.autostarted":
                    names.add(event.name)
                    if len(names) == 2:
                        break
    assert names == {"db", "crashed"}


@pytest.mark.slow
async def test_all_can_be_suspended_and_a_hanging_guest_takes_no_more_than_its_time(
    host: LocalHost, layout: Layout
) -> None:
    vm = await host.run("tiny", name="web", memory="96MiB")
    await vm.exec(["sh", "-c", "echo kept > /run/word"])
    done = await host.stop_all(timeout=60, suspend=True)
    assert [(each.name, each.outcome) for each in done] == [("web", "suspended")]
    await vm.start(wait=True, timeout=60)
    assert (await vm.exec(["cat", "/run/word"])).text == "kept"

    hanging = await host.run("tiny", name="hangs", memory="96MiB", boot_order=7)
    await hanging.exec(["sh", "-c", "kill -STOP $(pidof qemu-ga) 1 || true"])
    began = time.monotonic()
    done = await host.stop_all(timeout=20)
    assert time.monotonic() - began < 30
    assert [(each.name, each.outcome) for each in done] == [("hangs", "stopped"), ("web", "stopped")]
    assert (await host.stop_all()) == []


async def test_systemd_is_told_when_the_agent_listens_and_when_it_ends(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        async with agent(layout) as served:
            assert await asyncio.to_thread(systemd.recv, 100) == b"READY=1"
            assert await served.end() == 0
            assert await asyncio.to_thread(systemd.recv, 100) == b"STOPPING=1"


async def test_a_request_that_the_agents_end_cut_off_is_lost_and_told_so(host: LocalHost, layout: Layout) -> None:
    await host.run("tiny", name="web", memory="96MiB")
    async with agent(layout) as served, through_agent(layout) as reached:
        headers = {"Idempotency-Key": "once", "Prefer": "respond-async"}
        body = b'{"condition": "stopped"}'

        async def ask() -> Task:
            sent = reached._wire.request("POST", "/v1/vms/web/wait", content=body, headers=headers)
            async with sent as response:
                return msgspec.json.decode(await response.aread(), type=Task)

        task = await ask()
        assert task.state == "running"
        assert (await ask()).id == task.id, "the same key is the same request"
        await served.end(signal.SIGKILL)
    async with agent(layout), through_agent(layout) as reached:
        found = await reached._wire.get(f"/v1/tasks/{task.id}", Task)
        assert found.state == "lost"
        with pytest.raises(WrongState, match="the agent ended while"):
            await ask()
    assert (await host.ls())[0].phase is Phase.RUNNING


async def test_a_shutdown_in_the_middle_of_a_boot_ends_that(host: LocalHost, layout: Layout) -> None:
    for number in range(6):
        await host.create("tiny", name=f"v{number}", memory="96MiB", autostart=True, boot_order=number)
    async with agent(layout):
        await happened(host, "vm.started")
        await host.stop_all(timeout=30, for_shutdown=True)
        await asyncio.sleep(5)
        assert {each.phase for each in await host.ls()} == {Phase.STOPPED}
        assert layout.booted.exists()


async def test_a_start_that_fails_is_told_and_tried_again(host: LocalHost, layout: Layout) -> None:
    vm = await host.run("tiny", name="web", memory="96MiB", restart="on-failure")
    head = layout.vm(vm.id).head((await vm.disks())[0])
    async with agent(layout):
        aside = head.rename(head.with_suffix(".aside"))
        os.kill(await pid_of(vm), signal.SIGKILL)
        told = await happened(host, "vm.restart-failed")
        assert told.name == "web" and told.data["error"]
        aside.rename(head)
        told = await happened(host, "vm.restarted", after=told.id)
        assert told.data["reason"] == "killed" and told.data["count"] >= 2
