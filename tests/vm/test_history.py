"""A running computer treated like a commit: kept, restored, cloned; each copy has the content of its instant."""

import hashlib
import os
from pathlib import Path

import pytest
from tests.helpers.machines import Factory
from tests.helpers.world import disagreements

from atoll.errors import AlreadyExists, InvalidInput, NotFound, Unsupported
from atoll.model.requests import CreateRequest, DiskRequest
from atoll.model.state import Phase

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

MIB = 1024**2


def may_track_memory() -> bool:
    """An ordinary user as a rule may not."""
    return os.access("/dev/userfaultfd", os.R_OK | os.W_OK)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


async def test_a_running_guest_goes_on_from_where_it_was(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh(
        "echo one > /root/file; sync; echo kept > /tmp/in-memory; (while :; do sleep 1; done) & echo $! > /tmp/pid"
    )
    before, boot = await vm.read("/tmp/pid"), await vm.read("/proc/sys/kernel/random/boot_id")
    node = await vm.snapshot("clean", message="before the upgrade")
    assert node.memory is not None and node.memory.running
    frozen = hashes(factory.layout.layers) | hashes(factory.layout.memory)
    await vm.sh("echo two > /root/file; sync; rm /tmp/in-memory; kill $(cat /tmp/pid)")

    await vm.restore("clean")
    assert await vm.phase() is Phase.RUNNING
    assert await vm.read("/root/file") == "one"
    assert await vm.read("/tmp/in-memory") == "kept"
    assert await vm.sh(f"kill -0 {before} && echo alive") == "alive"
    assert await vm.read("/proc/sys/kernel/random/boot_id") == boot
    await vm.sh("sync; dd if=/dev/vda of=/dev/null bs=1M count=200 2>/dev/null")
    await vm.write("/root/file", "three")
    assert hashes(factory.layout.layers) | hashes(factory.layout.memory) == frozen, "frozen files are never written"

    await vm.restore("clean")
    assert await vm.read("/root/file") == "one"
    await vm.restart()
    await vm.wait("ready", timeout=120)
    assert await vm.read("/root/file") == "one"
    assert await disagreements(factory.layout) == []


async def test_a_stopped_vm_keeps_its_disks(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=(DiskRequest(name="data", size="8MiB"),))
    await vm.sh("echo one > /root/file; printf first > /dev/vdb; sync")
    await vm.stop()
    first = await vm.snapshot()
    assert first.name == "snap-1" and first.memory is None
    await vm.start(wait=True, timeout=120)
    await vm.sh("echo two > /root/file; printf secnd > /dev/vdb; sync")
    await vm.stop()
    second = await vm.snapshot("second")
    assert second.parent == first.id
    await vm.restore(first.id[:12])
    assert await vm.phase() is Phase.STOPPED
    third = await vm.snapshot("third")
    assert third.parent == first.id
    await vm.start(wait=True, timeout=120)
    assert (await vm.read("/root/file"), await vm.sh("head -c 5 /dev/vdb")) == ("one", "first")
    await vm.restore("second")
    await vm.wait("ready", timeout=120)
    assert (await vm.read("/root/file"), await vm.sh("head -c 5 /dev/vdb")) == ("two", "secnd")
    history = await vm.history()
    assert [(node.snapshot.name, node.heads) for node in history] == [("snap-1", ()), ("second", ("v",)), ("third", ())]
    assert await disagreements(factory.layout) == []


async def test_wrong_snapshots_are_refused_and_change_nothing(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v")
    await vm.snapshot("one")
    before = vm.record
    with pytest.raises(AlreadyExists, match="has a snapshot 'one' already"):
        await vm.snapshot("one")
    with pytest.raises(InvalidInput):
        await vm.snapshot("../x")
    with pytest.raises(InvalidInput, match="goes with --disk-only"):
        await vm.snapshot(quiesce=True)
    with pytest.raises(NotFound, match="has no snapshot 'two'"):
        await vm.restore("two")
    assert vm.record == before
    assert await factory.host.operations.ls(unfinished=True) == []
    assert await disagreements(factory.layout) == []


async def test_a_machine_with_plugged_disks_and_a_paused_guest_comes_back(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.disk_add(DiskRequest(name="hot", size="8MiB"))
    await vm.sh("i=0; until [ -b /dev/vdb ]; do i=$((i+1)); [ $i -lt 100 ] || exit 1; usleep 100000; done")
    await vm.sh("printf plugged > /dev/vdb; sync")
    await vm.pause()
    if not may_track_memory():
        with pytest.raises(Unsupported, match=r"/dev/userfaultfd is root's. Let it go on first: `atoll resume v`"):
            await vm.snapshot("paused")
        assert await vm.phase() is Phase.PAUSED and await vm.history() == []
        assert await disagreements(factory.layout) == []
        return
    await vm.snapshot("paused")
    await vm.resume()
    await vm.sh("printf changed > /dev/vdb; sync")
    await vm.restore("paused")
    assert await vm.phase() is Phase.PAUSED
    await vm.resume()
    assert await vm.sh("dd if=/dev/vdb iflag=direct bs=512 count=1 2>/dev/null | head -c 7") == "plugged"
    assert (await vm.disk_rm("hot")).when == "now"
    assert await disagreements(factory.layout) == []


async def test_clones_of_running_and_stopped_vms_go_their_own_ways(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo source > /root/file; sync")
    await vm.snapshot("clean", disk_only=True)
    await vm.sh("echo later > /root/file; sync")
    of_present = factory.machine(await vm.clone("present"))
    of_past = factory.machine(await factory.host.clone("v@clean", "past"))
    whole = factory.machine(await factory.host.clone("v@clean", "whole", full=True))
    assert whole.record.spec.disks[0].layer is None
    assert len({m.record.spec.nics[0].mac for m in (vm, of_present, of_past, whole)}) == 4
    await vm.forget("clean")
    await vm.rm(force=True)
    for machine, content in ((of_present, "later"), (of_past, "source"), (whole, "source")):
        await machine.start(wait=True, timeout=120)
        assert await machine.read("/root/file") == content
        assert await machine.sh("hostname") == machine.name
        await machine.sh("echo mine > /root/file; sync")
        await machine.stop(force=True)
    assert await disagreements(factory.layout) == []


async def test_forgetting_gives_space_back_and_leaves_heads_whole(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    for number in range(3):
        await vm.sh(f"dd if=/dev/urandom of=/root/big bs=1M count=4 2>/dev/null; echo {number} > /root/file; sync")
        await vm.snapshot(f"s{number}")
    content = await vm.sh("sha256sum /root/big")
    await vm.restore("s0")
    await vm.forget("s1")
    await vm.forget("s2")
    assert [node.snapshot.name for node in await vm.history()] == ["s0"]
    assert len(list(factory.layout.memory.iterdir())) == 1
    assert await vm.read("/root/file") == "0"
    assert await vm.sh("sha256sum /root/big") != content
    await vm.forget("s0")
    assert await vm.read("/root/file") == "0"
    await vm.rm(force=True)
    assert not list(factory.layout.memory.iterdir())
    assert await disagreements(factory.layout) == []


async def test_the_disks_alone_can_be_restored_and_a_running_guest_boots_on_them(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo one > /root/file; echo here > /dev/shm/memory; sync")
    await vm.snapshot("one")
    await vm.sh("echo two > /root/file; sync")
    await vm.restore("one", disk_only=True)
    await vm.wait("ready", timeout=120)
    assert await vm.read("/root/file") == "one"
    assert (await vm.exec(["test", "-e", "/dev/shm/memory"])).exit_code == 1
    await vm.stop(force=True)
    await vm.restore("one", disk_only=True)
    assert await vm.phase() is Phase.STOPPED
    assert await disagreements(factory.layout) == []


@pytest.mark.slow
async def test_several_disks_are_kept_at_one_instant_while_they_are_written(factory: Factory) -> None:
    disks = (DiskRequest(name="first", size="1MiB"), DiskRequest(name="second", size="1MiB"))
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=disks)
    count = "i=0; while :; do i=$((i+1)); for d in vdb vdc; do echo $i | dd of=/dev/$d conv=fsync; done; done"
    await vm.sh(f"({count}) </dev/null >/dev/null 2>&1 &")
    await vm.sh("until [ -n \"$(head -n1 /dev/vdc | tr -d '\\0')\" ]; do :; done")
    for number in range(4):
        await vm.snapshot(f"s{number}", disk_only=bool(number % 2))
        await vm.sh("sleep 0.2")
    seen = []
    for number in range(4):
        await vm.restore(f"s{number}", disk_only=True)
        await vm.wait("ready", timeout=120)
        first, second = [int(await vm.sh(f"head -n1 /dev/{disk}")) for disk in ("vdb", "vdc")]
        # The second disk gets each number after the first one has it for certain.
        assert second <= first <= second + 1
        seen.append(first)
    assert seen == sorted(set(seen))


async def test_a_quiesced_snapshot_freezes_the_file_systems_and_thaws_them(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo unsynced > /root/file")
    node = await vm.snapshot("calm", disk_only=True, quiesce=True)
    assert node.quiesced
    await vm.sh("echo goes on > /root/file; sync")
    await vm.restore("calm")
    await vm.wait("ready", timeout=120)
    assert await vm.read("/root/file") == "unsynced"


async def test_the_variables_of_uefi_belong_to_a_snapshot(factory: Factory) -> None:
    vm = factory.machine(await factory.host.create(CreateRequest(name="v", firmware="uefi", disk_size="1MiB")))
    nvram = factory.layout.vm(vm.id).nvram
    fresh = nvram.read_bytes()
    await vm.snapshot("fresh")
    nvram.write_bytes(fresh[:-1] + b"x")
    await vm.snapshot("changed")
    clone = await factory.host.clone("v@fresh", "w")
    assert factory.layout.vm(clone.id).nvram.read_bytes() == fresh
    await vm.restore("fresh")
    assert nvram.read_bytes() == fresh
    await vm.start()
    await vm.snapshot("running")
    await vm.restore("changed")
    assert nvram.read_bytes()[:-1] == fresh[:-1] and nvram.read_bytes()[-1:] == b"x"
    await vm.restore("running")
    assert await vm.phase() is Phase.RUNNING
    assert await disagreements(factory.layout) == []
