"""What differs between snapshots and machines: exactly the files that a guest has changed, the bytes it has written."""

import asyncio
import json

import pytest
from tests.helpers.command import atoll
from tests.helpers.machines import Factory, Machine
from tests.helpers.world import disagreements

from atoll.errors import NotFound
from atoll.model.difference import Difference, DiskDifference
from atoll.model.requests import DiskRequest, SetRequest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

# What a guest of its own accord writes while it runs.
OF_THE_SYSTEM = ("/var", "/run", "/tmp", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname")


def files(found: Difference, disk: str = "root") -> dict[str, str]:
    """Path and change of each file that differs on a disk."""
    return {
        file.path: file.change
        for each in found.disks
        if each.name == disk
        for system in each.file_systems
        for file in system.files
        if not file.path.startswith(OF_THE_SYSTEM)
    }


def of_disk(found: Difference, name: str) -> DiskDifference:
    return next(disk for disk in found.disks if disk.name == name)


async def prepared(factory: Factory) -> Machine:
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=(DiskRequest(name="data", size="8MiB"),))
    await vm.sh(
        "mkdir -p /root/d; echo 1 > /root/a; echo 22 > /root/gone; echo same > /root/same; echo m > /root/mode;"
        "echo one > /root/content; touch -d '2020-01-01 00:00:00' /root/content; ln -s /a /root/link; sync"
    )
    return vm


async def test_a_running_guests_snapshots_differ_by_just_the_files_it_changed(factory: Factory) -> None:
    vm = await prepared(factory)
    one = await vm.snapshot("one")
    await vm.sh(
        "echo longer > /root/a; rm /root/gone; chmod 600 /root/mode; ln -snf /bb /root/link; echo n > /root/d/new;"
        "echo two > /root/content; touch -d '2020-01-01 00:00:00' /root/content; sync"
    )
    await vm.snapshot("two")
    found = await factory.host.diff("v@one", "v@two")
    assert found.settings == () and found.notes == ()
    assert files(found) == {
        "/root/a": "modified",
        "/root/gone": "removed",
        "/root/mode": "modified",
        "/root/link": "modified",
        "/root/content": "modified",
        "/root/d/new": "added",
    }
    by_path = {file.path: file for file in of_disk(found, "root").file_systems[0].files}
    assert (by_path["/root/a"].old_size, by_path["/root/a"].new_size) == (2, 7)
    assert by_path["/root/mode"].aspects == ("mode",)
    assert by_path["/root/link"].aspects == ("target",)
    assert by_path["/root/content"].aspects == ("content",), "also where the times were set back"
    back = await factory.host.diff("v@two", one.id)
    assert (files(back)["/root/gone"], files(back)["/root/d/new"]) == ("added", "removed")
    assert (await factory.host.diff("v@one", "v@one")).nothing

    await vm.sh("echo more > /root/present; sync")
    present = await vm.diff("two")
    assert files(present) == {"/root/present": "added"}
    assert "v runs" in present.notes[0]

    told = await asyncio.to_thread(atoll, "diff", "v@one", "v@two")
    assert told.code == 0, told.err
    assert "  M /root/a  2B -> 7B  size\n" in told.out
    assert "  D /root/gone  3B\n" in told.out
    as_json = await asyncio.to_thread(atoll, "diff", "v@one", "v@two", "--format", "json")
    assert json.loads(as_json.out)["disks"][0]["name"] == "root"
    with pytest.raises(NotFound):
        await factory.host.diff("v@one", "v@three")
    assert await disagreements(factory.layout) == []


async def test_what_a_guest_has_made_safe_is_seen_though_only_the_journal_has_it(factory: Factory) -> None:
    vm = await prepared(factory)
    await vm.snapshot("one", disk_only=True)
    # fsync writes the content and the journal; the file system's own blocks follow half a minute later.
    await vm.sh("rm /root/gone; mkdir /root/deep; echo safe | dd of=/root/deep/safe conv=fsync 2>/dev/null")
    await vm.snapshot("two", disk_only=True)
    found = await factory.host.diff("v@one", "v@two")
    assert files(found) == {"/root/deep": "added", "/root/deep/safe": "added", "/root/gone": "removed"}
    safe = next(file for file in of_disk(found, "root").file_systems[0].files if file.path.endswith("safe"))
    assert safe.new_size == 5
    # In place now, and the same.
    await vm.sh("sync")
    assert files(await vm.diff("one")) == files(found)
    assert files(await vm.diff("two")) == {}


@pytest.mark.slow
async def test_disks_without_a_file_system_differ_by_blocks_and_settings_by_name(factory: Factory) -> None:
    vm = await prepared(factory)
    await vm.stop()
    await vm.snapshot("one")
    clone = await factory.host.clone("v@one", "copy")
    assert (await factory.host.diff("v@one", "copy")).nothing, "a fresh clone is the same, but for who it is"
    assert (await factory.host.diff("v", "copy")).nothing

    await vm.set(SetRequest(memory="128MiB", cpus=2))
    await vm.disk_resize("data", "16MiB")
    await vm.disk_add(DiskRequest(name="more", size="4MiB", bus="nvme"))
    found = await vm.diff("one")
    changed = {each.name: (each.old, each.new) for each in found.settings}
    assert changed["memory"] == ("96MiB", "128MiB")
    assert changed["cpus"] == ("1", "2")
    assert changed["disk data"] == ("8MiB virtio", "16MiB virtio")
    assert changed["disk more"] == ("", "4MiB nvme")
    assert changed.keys() <= {"memory", "cpus", "cpus at most", "disk data", "disk more"}
    assert found.disks == ()

    await vm.start(wait=True, timeout=120)
    at = "bs=4096 conv=notrunc 2>/dev/null"
    await vm.sh(f"dd if=/dev/urandom of=/dev/vdb seek=3 count=2 {at}; printf x | dd of=/dev/vdb seek=3000 {at}; sync")
    await vm.sh("dd if=/dev/zero of=/dev/vdb bs=4096 seek=100 count=5 conv=notrunc 2>/dev/null; sync")
    await vm.stop()
    blocks = of_disk(await vm.diff("one"), "data").blocks
    assert blocks is not None
    assert (blocks.ranges, blocks.bytes) == (2, 3 * 4096), "what was written and is the same isn't told"
    assert "no ext2, ext3 or ext4 file system" in blocks.why
    told = await asyncio.to_thread(atoll, "diff", "copy", "v")
    assert "disk data: 12KiB in 2 ranges differ" in told.out
    await clone.rm()
    assert await disagreements(factory.layout) == []


async def test_a_whole_copy_is_compared_without_a_layer_in_common(factory: Factory) -> None:
    vm = await prepared(factory)
    await vm.stop()
    whole = await factory.host.clone("v", "whole", full=True)
    found = await factory.host.diff("v", "whole")
    assert found.disks == ()
    await vm.start(wait=True, timeout=120)
    await vm.sh("echo x > /root/x; rm /root/gone; sync")
    await vm.stop()
    assert files(await factory.host.diff("whole", "v")) == {"/root/x": "added", "/root/gone": "removed"}
    await whole.rm()
    assert await disagreements(factory.layout) == []
