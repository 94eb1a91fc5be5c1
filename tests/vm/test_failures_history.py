"""QEMU dies, or the disk is full, at every step of the verbs that keep and copy machines: what is told is true, nothing
that was kept is lost, and everything goes on once the cause is gone.
"""

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.helpers import leftovers
from tests.helpers.images import adopt_cached
from tests.helpers.machines import Factory, Machine
from tests.helpers.world import disagreements

from atoll.errors import AtollError
from atoll.layout import Layout
from atoll.model.state import Phase
from atoll.operations import engine
from atoll.operations.registry import VERBS

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
async def test_qemu_dies_at_any_step(verb: str, factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await kept(factory)
    for step in VERBS[verb].steps:
        for moment in ("before", "after"):
            if await vm.phase() is not Phase.RUNNING:
                await vm.start(wait=True, timeout=120)
            await vm.sh("echo second > /root/file; sync")
            with monkeypatch.context() as patch:
                patch.setattr(engine, "fault_point", killer(vm, verb, step.name, moment))
                with contextlib.suppress(AtollError):
                    await ACTS[verb](vm)
            for node in await vm.history():
                if node.snapshot.name != "first":
                    await vm.forget(node.snapshot.name)
            await is_whole(factory, vm)


def killer(vm: Machine, verb: str, step: str, moment: str) -> Callable[[str, str, str], None]:
    def fault(*point: str) -> None:
        run = vm.record.run
        if point == (verb, step, moment) and run is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGKILL)
                until_ended(run.pid)

    return fault


def until_ended(pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        select.select([descriptor], [], [], 10)
    finally:
        os.close(descriptor)


@pytest.fixture
def small_home(home: Path) -> Iterator[Path]:
    """The home on a file system of its own that can be filled."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m,mode=755", "tmpfs", home], check=True)
    try:
        yield home
    finally:
        leftovers.end_processes_of(home)
        subprocess.run(["umount", "--lazy", home], check=True)


@pytest.mark.parametrize("verb", sorted(ACTS))
async def test_the_disk_is_full_at_any_step(
    verb: str, small_home: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adopt_cached("tiny", layout)
    filler = small_home / "filler"
    async with Factory(layout) as factory:
        vm = await kept(factory)
        for step in VERBS[verb].steps:
            if await vm.phase() is not Phase.RUNNING:
                await vm.start(wait=True, timeout=120)
            with monkeypatch.context() as patch:
                patch.setattr(engine, "fault_point", filling(filler, verb, step.name))
                try:
                    await ACTS[verb](vm)
                    failed = False
                except AtollError as error:
                    failed = True
                    assert error.text
            filler.unlink(missing_ok=True)
            assert failed or step.name != "heads"
            # What couldn't be written down while the disk was full is settled by the next command.
            async with type(factory.host)(layout) as again:
                for operation in await again.operations.ls(unfinished=True):
                    await again.operations.retry(operation.id)
            for node in await vm.history():
                if node.snapshot.name != "first":
                    await vm.forget(node.snapshot.name)
            await is_whole(factory, vm)


def filling(filler: Path, verb: str, step: str) -> Callable[[str, str, str], None]:
    def fault(*point: str) -> None:
        if point == (verb, step, "before"):
            with filler.open("ab") as file, contextlib.suppress(OSError):
                for size in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)):
                            file.flush()

    return fault
