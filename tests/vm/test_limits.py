"""What a VM may take of its computer, measured on guests that take all they can."""

import asyncio
import os
import time
from pathlib import Path

import pytest
from tests.helpers.machines import Factory, Machine
from tests.helpers.person import USER, somebody

from atoll.errors import InvalidInput
from atoll.host import cgroups
from atoll.model.requests import DiskRequest, SetRequest
from atoll.model.units import MIB

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


async def seconds_to_read(vm: Machine, disk: str, mebibytes: int) -> float:
    before = time.monotonic()
    await vm.sh(f"echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/{disk} of=/dev/null bs=1M count={mebibytes} 2>/dev/null")
    return time.monotonic() - before


async def test_disks_are_held_back_together_from_the_start_and_live(factory: Factory) -> None:
    extra = DiskRequest(name="extra", size="64MiB")
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=(extra,), io_limit="8MiB/s")
    # A tenth of a second's worth passes at once.
    assert await seconds_to_read(vm, "vdb", 16) > 1.5
    await vm.snapshot("s")
    assert await seconds_to_read(vm, "vdb", 16) > 1.5, "a snapshot changes the disk's nodes"
    (change,) = await vm.set(SetRequest(io_limit=0))
    assert (change.name, change.when) == ("io-limit", "now")
    assert await seconds_to_read(vm, "vdb", 16) < 1.5
    await vm.set(SetRequest(io_limit=8 * MIB, iops_limit=1000))
    await vm.disk_add(DiskRequest(name="late", size="64MiB"))
    assert await seconds_to_read(vm, "vdc", 16) > 1.5
    assert vm.record.spec.limits.io_operations == 1000 and vm.record.pending is None
    await vm.restore("s")
    assert await seconds_to_read(vm, "vdb", 16) > 1.5, "as it was when the snapshot was made"


async def test_what_can_t_be_is_refused_and_changes_nothing(factory: Factory) -> None:
    vm = await factory.create("tiny", name="v", memory="96MiB")
    for wrong in (SetRequest(cpu_limit=-1), SetRequest(cpu_limit=0.001), SetRequest(iops_limit=-1)):
        with pytest.raises(InvalidInput):
            await vm.set(wrong)
    with pytest.raises(InvalidInput, match="not a size"):
        await vm.set(SetRequest(io_limit="fast"))
    assert vm.record.spec.limits.cpus == 0


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def share_taken(vm: Machine, seconds: float = 3) -> float:
    before, began = processor_time(vm.pid), time.monotonic()
    await asyncio.sleep(seconds)
    return (processor_time(vm.pid) - before) / (time.monotonic() - began)


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpu", os.W_OK), reason="takes root: cgroups of the first version")
async def test_a_busy_guest_takes_no_more_processors_time_than_it_may(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB", cpu_limit=0.5)
    assert vm.record.run is not None and vm.record.run.isolation is not None
    assert "0.5 processors' time, control group" in {each.why for each in vm.record.run.isolation.barriers}
    await vm.sh("while :; do :; done >/dev/null 2>&1 &")
    assert await share_taken(vm) < 0.6
    (change,) = await vm.set(SetRequest(cpu_limit=0.1))
    assert (change.name, change.value, change.when) == ("cpu-limit", "0.1", "now")
    assert await share_taken(vm) < 0.2


@pytest.mark.slow
def test_an_ordinary_user_is_told_that_only_disks_are_held_back() -> None:
    with somebody(USER) as person:
        person.atoll("image", "build", "tiny", "--quiet")
        person.atoll(
            "run", "tiny", "--name", "v", "--memory", "96MiB", "--quiet", "--cpu-limit", "1", "--io-limit", "1M"
        )
        told = person.atoll("show", "v").decode()
        assert "1 processors' time, 1MiB/s for its disks" in told
        assert "CPU limit: no: " in told
        assert f"at the next start: {cgroups.NO_GROUP}" in person.atoll("set", "v", "--cpu-limit", "0.5").decode()
        assert b"io-limit  2MiB/s  now" in person.atoll("set", "v", "--io-limit", "2MiB")
        person.atoll("rm", "--force", "v")
