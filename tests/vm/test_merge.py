"""Chains stay short: layers are merged while machines run on them, and no content changes."""

import asyncio
from pathlib import Path

import pytest
from tests.helpers.machines import Factory, Machine
from tests.helpers.world import disagreements

from atoll.errors import Cancelled, MissingTool
from atoll.host import process
from atoll.model.chain import LONGEST
from atoll.model.operation import Progress
from atoll.model.requests import DiskRequest
from atoll.model.state import Phase
from atoll.operations import merge as merging
from atoll.operations.merge import merge
from atoll.operations.merge_content import merge_content
from atoll.operations.power import control
from atoll.operations.relink import nodes_below
from atoll.qemu.devices import head_node
from atoll.qemu.plan import layer_chain

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say themselves when it is merged."""
    monkeypatch.setattr(merging, "begin", lambda services, vm_id: None)


def lengths(factory: Factory, vm: Machine) -> list[int]:
    layers = {layer.id: layer for layer in factory.host._services.records.layers()}
    return [len(layer_chain(disk.layer, layers)) for disk in vm.record.spec.disks]


async def below(factory: Factory, vm: Machine) -> list[list[str]]:
    async with control(factory.host._services, vm.record) as monitor:
        return [await nodes_below(monitor, head_node(disk)) for disk in vm.record.spec.disks]


@pytest.mark.usefixtures("by_hand")
async def test_a_running_guest_is_put_on_merged_layers(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=(DiskRequest(name="more", size="8MiB"),))
    for number in range(12):
        await vm.sh(f"echo {number} > /root/{number}; echo {number} > /root/last; sync")
        await vm.sh(f"dd if=/dev/urandom of=/dev/vdb bs=64k count=3 seek={number} conv=fsync 2>/dev/null")
        await vm.snapshot(f"s{number}", disk_only=True)
    before = await vm.sh("sha256sum /dev/vdb /root/*")
    for number in range(12):
        if number not in (4, 9):
            await vm.forget(f"s{number}")
    assert max(lengths(factory, vm)) > LONGEST
    assert await merge(services=factory.host._services, vm_id=vm.id) >= 2
    assert max(lengths(factory, vm)) <= LONGEST
    # QEMU has changed over: the files that it held open are gone.
    assert [len(names) for names in await below(factory, vm)] == lengths(factory, vm)
    await vm.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert await vm.sh("sha256sum /dev/vdb /root/*") == before
    await vm.sh("echo after > /root/after; sync")
    assert await disagreements(factory.layout) == []
    assert {path.stem for path in factory.layout.layers.iterdir()} == {
        layer.id for layer in factory.host._services.records.layers()
    }
    assert await factory.host.prune(dry_run=True) == [], "what was merged and nobody needs is gone"

    clone = factory.machine(await vm.clone("w"))
    await clone.start(wait=True, timeout=120)
    assert await clone.read("/root/after") == "after"
    for number in (9, 4):
        await vm.restore(f"s{number}")
        await vm.wait("ready", timeout=120)
        assert await vm.read("/root/last") == str(number)
    assert await disagreements(factory.layout) == []


@pytest.mark.slow
@pytest.mark.usefixtures("by_hand")
async def test_snapshots_that_all_are_kept_are_whole_after_merging(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    for number in range(2 * LONGEST):
        await vm.sh(f"echo {number} > /root/last; sync")
        await vm.snapshot(f"s{number}", disk_only=True)
        await merge(services=factory.host._services)
        assert max(lengths(factory, vm)) <= LONGEST
    await vm.disk_add(DiskRequest(name="more", size="1MiB"))
    await vm.disk_rm("more")
    await vm.stop(force=True)
    for number in range(0, 2 * LONGEST, 5):
        await vm.restore(f"s{number}")
        await vm.start(wait=True, timeout=120)
        assert await vm.read("/root/last") == str(number)
        await vm.stop(force=True)
    assert await disagreements(factory.layout) == []


@pytest.mark.usefixtures("by_hand")
async def test_a_cancelled_merge_changes_nothing(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    for number in range(LONGEST + 2):
        await vm.snapshot(f"s{number}")
    before = factory.host._services.records.layers()
    under_way = asyncio.Event()

    def report(progress: Progress) -> None:
        if progress.step == "copy":
            under_way.set()

    task = asyncio.create_task(merge(services=factory.host._services, report=report))
    await under_way.wait()
    task.cancel()
    with pytest.raises((asyncio.CancelledError, Cancelled)):
        await task
    assert factory.host._services.records.layers() == before
    assert await disagreements(factory.layout) == []
    assert not list(factory.layout.temporary.iterdir())
    assert await merge(services=factory.host._services) == 1
    await vm.start()
    assert await vm.phase() is Phase.RUNNING


async def test_long_chains_are_merged_in_the_background(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    for number in range(LONGEST + 4):
        await vm.snapshot(f"s{number}")
    async with asyncio.timeout(60):
        async for event in factory.host.events(after=0):
            if event.kind == "layers.merged" and max(lengths(factory, vm)) <= LONGEST:
                break
    assert [operation.state for operation in await factory.host.operations.ls() if operation.verb == "merge"]


async def test_a_missing_storage_daemon_is_told_at_once(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "find", lambda program: (_ for _ in ()).throw(MissingTool(f"no {program}")))
    async with asyncio.timeout(5):
        with pytest.raises(MissingTool, match="qemu-storage-daemon"):
            await merge_content([tmp_path / "below"], tmp_path / "new", count=1, report=lambda progress: None)
