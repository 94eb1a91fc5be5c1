"""QEMU dies at every step of the verbs that copy machines, carry them away, and merge their layers: what is told is
true, the guests' data have the checksums that they had, and nothing is left behind.
"""

import contextlib

import pytest
from tests.helpers import faults
from tests.helpers.copying import ACTS, check_made, cleared, content, grown, kept, nothing_is_left
from tests.helpers.machines import Factory

from atoll.errors import AtollError
from atoll.model.operation import Progress
from atoll.model.state import Phase
from atoll.operations.boot import engines_of
from atoll.operations.merge import merge

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(500), pytest.mark.usefixtures("short_chains")]


@pytest.mark.parametrize("verb", ["snapshot", "create", "start"])
async def test_a_source_that_dies_at_any_step_of_a_fork_loses_nothing(verb: str, factory: Factory) -> None:
    at = await kept(factory)
    # What becomes of the source is no concern of the copy's own steps.
    for point in faults.points(verb, moments=("before", "after") if verb == "snapshot" else ("before",)):
        with faults.at(point, lambda: faults.kill_qemu(at.vm.record)) as reached, contextlib.suppress(AtollError):
            await at.vm.fork(name="copy")
        assert reached
        # Once its memory was kept the copy needs it no more.
        assert await at.drop_copy(of=at.now) or verb == "snapshot", point
        assert await at.vm.phase() is Phase.STOPPED
        await nothing_is_left(factory)
        await at.is_whole()


@pytest.mark.parametrize("source", ["v", "v@first"])
async def test_a_copy_that_dies_at_any_step_is_told_or_can_be_started(source: str, factory: Factory) -> None:
    at = await kept(factory)
    for point in faults.points("start")[3:]:

        def die() -> None:
            copy = next(vm for vm in factory.host._services.records.vms() if vm.name == "copy")
            assert engines_of(copy)
            faults.kill_qemu(copy)

        with faults.at(point, die) as reached, contextlib.suppress(AtollError):
            await factory.host.fork(source, name="copy")
        assert reached
        await nothing_is_left(factory)
        await at.drop_copy(of=at.now if source == "v" else at.first)
        await nothing_is_left(factory)
        assert await at.vm.phase() is Phase.RUNNING
        await at.is_whole()


async def test_a_waiting_copy_that_dies_as_it_is_taken_is_replaced_or_can_be_started(factory: Factory) -> None:
    at = await kept(factory)
    for point in faults.points("take"):
        await factory.host.pools.fill("v@first", 2)
        waiting = next(vm for vm in factory.host._services.records.vms() if vm.pool)
        with faults.at(point, lambda waiting=waiting: faults.kill_qemu(waiting)) as reached:
            await factory.host.pools.take("v@first", "copy")
        assert reached
        await nothing_is_left(factory)
        assert await at.drop_copy(of=at.first), "the next one that waits is taken"
        # One that died as it waited is replaced.
        await factory.host.pools.fill("v@first", 2)
        for vm in [vm for vm in factory.host._services.records.vms() if vm.pool]:
            assert await factory.machine(await factory.host.get(vm.id)).phase() is Phase.PAUSED
        await at.is_whole()


OWN_STEPS = {"clone": "create", "backup": "backup", "export": "export", "image create": "cut"}
"""`test_failures_history` has the steps of the cut that all begin with."""


@pytest.mark.parametrize("name", OWN_STEPS)
async def test_what_is_copied_of_a_machine_that_dies_is_whole(name: str, factory: Factory) -> None:
    at = await kept(factory)
    for point in faults.points(OWN_STEPS[name], moments=("before",)):
        made = name != "image create"
        with faults.at(point, lambda: faults.kill_qemu(at.vm.record)) as reached:
            try:
                await ACTS[name].do(at)
                made = True
            except AtollError:
                assert not made, point
        assert reached
        if made:
            await check_made(name, at)
        await cleared(at)
        assert await at.vm.phase() is Phase.STOPPED
        await nothing_is_left(factory)
        await at.is_whole()


async def test_machines_that_die_at_any_step_of_a_merge_have_their_data(factory: Factory) -> None:
    at = await kept(factory)
    await at.vm.forget("first")
    for point in faults.points("merge"):
        await grown(at)
        other = factory.machine((await at.vm.fork(name="copy"))[0])
        with faults.at(point, lambda: faults.kill_qemu(at.vm.record)) as reached:
            assert await merge(services=factory.host._services) >= 1
        assert reached
        await nothing_is_left(factory)
        assert await other.phase() is Phase.RUNNING
        assert await at.vm.phase() is Phase.STOPPED
        assert await at.drop_copy(of=at.now)
        await at.vm.start(wait=True, timeout=120)
        assert await content(at.vm) == at.now


async def test_a_storage_daemon_that_dies_is_told_and_nothing_is_merged(factory: Factory) -> None:
    at = await kept(factory)
    await grown(at)
    before = factory.host._services.records.layers()
    killed: list[int] = []

    def die(progress: Progress) -> None:
        if progress.step == "merge layers" and not killed:
            killed.extend(faults.children("qemu-storage-daemon"))
            for pid in killed:
                faults.kill(pid)

    with pytest.raises(AtollError, match="qemu-storage-daemon"):
        await merge(services=factory.host._services, report=die)
    assert killed
    assert factory.host._services.records.layers() == before
    await nothing_is_left(factory)
    assert await merge(services=factory.host._services) >= 1
    assert await content(at.vm) == at.now
    await nothing_is_left(factory)
