"""QEMU dies, or the disk is full, at every step of the verbs that keep and copy machines: what is told is true, nothing
that was kept is lost, and everything goes on once the cause is gone.
"""

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.helpers import faults
from tests.helpers.images import adopt_cached
from tests.helpers.machines import Factory, Machine
from tests.helpers.world import disagreements

from atoll.errors import AtollError
from atoll.layout import Layout
from atoll.model.state import Phase

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(400)]

Act = Callable[[Machine], Awaitable[None]]


async def take_snapshot(vm: Machine) -> None:
    await vm.snapshot("new")


async def restore_it(vm: Machine) -> None:
    await vm.restore("first")


async def clone_it(vm: Machine) -> None:
    await vm.clone("copy")


async def suspend_it(vm: Machine) -> None:
    await vm.suspend()


ACTS: dict[str, Act] = {"snapshot": take_snapshot, "restore": restore_it, "cut": clone_it, "suspend": suspend_it}


async def kept(factory: Factory) -> Machine:
    """A running VM with a snapshot; `/root/file` has what was kept, and the disk has gone on since."""
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo first > /root/file; sync")
    await vm.snapshot("first")
    await vm.sh("echo second > /root/file; sync")
    return vm


async def is_whole(factory: Factory, vm: Machine) -> None:
    """It can be used, has the data of one of its two instants, and its snapshot has its own."""
    for info in await factory.host.ls():
        if info.vm.name == "copy":
            await (await factory.host.get("copy")).rm()
    assert await factory.host.operations.ls(unfinished=True) == []
    assert await disagreements(factory.layout) == []
    if await vm.phase() is Phase.PAUSED:
        raise AssertionError("the guest was left standing still")
    if await vm.phase() is not Phase.RUNNING:
        await vm.start(wait=True, timeout=120)
    assert await vm.read("/root/file") in ("first", "second")
    await vm.restore("first")
    assert await vm.read("/root/file") == "first"
    assert await disagreements(factory.layout) == []


@pytest.mark.parametrize("verb", sorted(ACTS))
async def test_qemu_dies_at_any_step(verb: str, factory: Factory) -> None:
    vm = await kept(factory)
    for point in faults.points(verb):
        if await vm.phase() is not Phase.RUNNING:
            await vm.start(wait=True, timeout=120)
        await vm.sh("echo second > /root/file; sync")
        with faults.at(point, lambda: faults.kill_recorded(vm.record)), contextlib.suppress(AtollError):
            await ACTS[verb](vm)
        for node in await vm.history():
            if node.snapshot.name != "first":
                await vm.forget(node.snapshot.name)
        await is_whole(factory, vm)


@pytest.mark.parametrize("verb", sorted(ACTS))
async def test_the_disk_is_full_at_any_step(verb: str, small_home: Path, layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    filler = small_home / "filler"
    async with Factory(layout) as factory:
        vm = await kept(factory)
        for point in faults.points(verb, moments=("before",)):
            if await vm.phase() is not Phase.RUNNING:
                await vm.start(wait=True, timeout=120)
            with faults.at(point, lambda: faults.fill(filler)):
                try:
                    await ACTS[verb](vm)
                    failed = False
                except AtollError as error:
                    failed = True
                    assert error.text
            filler.unlink(missing_ok=True)
            assert failed or point[1] != "heads"
            # What couldn't be written down while the disk was full is settled by the next command.
            async with type(factory.host)(layout) as again:
                for operation in await again.operations.ls(unfinished=True):
                    await again.operations.retry(operation.id)
            for node in await vm.history():
                if node.snapshot.name != "first":
                    await vm.forget(node.snapshot.name)
            await is_whole(factory, vm)
