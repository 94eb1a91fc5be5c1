"""Making, starting, stopping, renaming and removing a real VM."""

import asyncio
import contextlib
import os
import signal
import time

import pytest
from tests.helpers.machines import Factory

from atoll.errors import AlreadyExists, InvalidInput, NotFound, TimedOut, WrongState
from atoll.model.requests import SetRequest
from atoll.model.state import Phase
from atoll.platform.local import LocalHost

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]


async def test_a_vm_lives_its_life(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    assert await vm.phase() is Phase.STOPPED
    await vm.start(wait=True, timeout=120)
    assert await vm.phase() is Phase.RUNNING
    assert await vm.sh("hostname") == "v"
    await vm.pause()
    assert await vm.phase() is Phase.PAUSED
    await vm.pause()
    await vm.resume()
    assert await vm.phase() is Phase.RUNNING
    await vm.resume()
    await vm.write("/root/kept", "yes")
    await vm.stop()
    assert await vm.phase() is Phase.STOPPED
    exit = (await vm.info()).exit
    assert exit is not None and (exit.reason, exit.detail) == ("stopped", "by the guest agent")
    await vm.stop()
    await vm.start(wait=True, timeout=120)
    assert await vm.read("/root/kept") == "yes"
    with pytest.raises(WrongState, match="Stop it first, or use `atoll rm --force v`"):
        await vm.rm()
    await vm.rm(force=True)
    assert await factory.host.ls() == []
    with pytest.raises(NotFound):
        await vm.info()


async def test_verbs_in_the_wrong_phase_are_refused_with_the_next_step(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    for verb in (vm.pause, vm.resume):
        with pytest.raises(WrongState, match=r"it is stopped\. Start it with `atoll start v`"):
            await verb()
    with pytest.raises(WrongState, match="it is stopped"):
        await vm.exec(["true"])
    await vm.start()
    with pytest.raises(WrongState, match=r"it is running\. Stop it with `atoll stop v`"):
        await vm.start()
    await vm.pause()
    with pytest.raises(WrongState, match=r"it is paused\. Let it go on with `atoll resume v`"):
        await vm.exec(["true"])


async def test_a_paused_vm_is_stopped_by_its_guest(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.pause()
    await vm.stop(timeout=60)
    exit = (await vm.info()).exit
    assert exit is not None and exit.detail == "by the guest agent"


async def test_without_an_agent_the_power_button_stops_it(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    # A guest that Atoll knows no agent of.
    await vm.set(SetRequest(agent=False))
    await vm.stop(timeout=60)
    exit = (await vm.info()).exit
    assert exit is not None and exit.detail == "by the power button"


async def test_a_guest_that_listens_to_nothing_is_forced_when_the_time_is_over(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    # The agent answers before the last of the guest's programs have started.
    await vm.sh("until killall acpid; do usleep 50000; done")
    await vm.set(SetRequest(agent=False))
    before = time.monotonic()
    await vm.stop(timeout=2)
    assert 2 <= time.monotonic() - before < 15
    exit = (await vm.info()).exit
    assert exit is not None and exit.detail == "forced after 2 s"


async def test_a_restart_boots_the_guest_again(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    boot = await vm.read("/proc/sys/kernel/random/boot_id")
    pid = vm.pid
    await vm.restart()
    await vm.wait("ready", timeout=120)
    assert vm.pid != pid
    assert await vm.read("/proc/sys/kernel/random/boot_id") != boot


async def test_a_vm_is_renamed_while_it_runs_and_told_at_its_next_start(factory: Factory) -> None:
    vm = await factory.run("tiny", name="old", memory="96MiB")
    await factory.create("tiny", name="other")
    with pytest.raises(AlreadyExists, match="there is a VM 'other' already"):
        await vm.rename("other")
    assert await factory.host.operations.ls(unfinished=True) == []
    with pytest.raises(InvalidInput):
        await vm.rename("../x")
    await vm.rename("new")
    assert (await factory.host.get("new")).id == vm.id
    with pytest.raises(NotFound, match="there is no VM 'old'"):
        await factory.host.get("old")
    await vm.restart()
    await vm.wait("ready", timeout=120)
    assert await vm.sh("hostname") == "new"


async def test_names_ids_and_their_unique_prefixes_find_a_vm(factory: Factory) -> None:
    web, worker = await factory.create("tiny", name="web"), await factory.create("tiny", name="worker")
    for reference in ("web", "we", web.id, web.id[:12]):
        assert (await factory.host.get(reference)).id == web.id
    with pytest.raises(InvalidInput, match="'w' fits 2 VMs: web, worker"):
        await factory.host.get("w")
    with pytest.raises(NotFound, match="Did you mean worker"):
        await factory.host.get("wroker")
    assert (await factory.host.get("wo")).id == worker.id


async def test_labels_are_set_and_taken_away(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", labels={"team": "blue"})
    changes = await vm.set(SetRequest(labels={"team": None, "stage": "test"}))
    assert vm.record.labels == {"stage": "test"}
    assert [(change.name, change.value, change.when) for change in changes] == [
        ("label stage", "test", "now"),
        ("label team", "", "now"),
    ]


async def test_waiting_for_text_for_ready_and_for_the_end(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    with pytest.raises(WrongState, match="it is stopped"):
        await vm.wait("ready", timeout=5)
    await vm.start()
    assert await vm.wait("ready", timeout=120) == "ready"
    text = asyncio.create_task(vm.wait(text=r"hello \d\d", timeout=60))
    await vm.sh("echo hello 42 > /dev/ttyS0")
    assert await text == "hello 42"
    with pytest.raises(TimedOut, match=r"'never said' wasn't said within 0\.5 s"):
        await vm.wait(text="never said", timeout=0.5)
    end = asyncio.create_task(vm.wait("stopped", timeout=60))
    never = asyncio.create_task(vm.wait(text="never said", timeout=60))
    await asyncio.sleep(0)
    await vm.stop()
    await end
    with pytest.raises(WrongState):
        await never


async def test_events_are_followed_from_another_process_to_the_death_of_qemu(factory: Factory) -> None:
    heard: list[str] = []

    async def listen(name: str) -> None:
        async with LocalHost(factory.layout) as other, contextlib.aclosing(other.events()) as events:
            ready.set()
            async for event in events:
                heard.append(f"{event.kind} {event.data.get('reason', '')}".strip())
                if event.kind == name:
                    return

    ready = asyncio.Event()
    listener = asyncio.create_task(listen("vm.ended"))
    await ready.wait()
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.pause()
    await vm.resume()

    os.kill(vm.pid, signal.SIGKILL)
    # Nobody but the listener looks: it notices and records the death itself.
    await asyncio.wait_for(listener, 20)
    assert heard == ["vm.created", "vm.started", "vm.paused", "vm.resumed", "vm.ended killed"]
