"""The disk is full at every step of the verbs that copy machines, carry them away, and merge their layers: it is told,
the guests' data have the checksums that they had, nothing is left behind, and with room it is done as ever.
"""

import re
import subprocess
from pathlib import Path

import pytest
from tests.helpers import faults
from tests.helpers.copying import ACTS, check_made, cleared, kept, nothing_is_left
from tests.helpers.images import adopt_cached
from tests.helpers.machines import Factory
from tests.helpers.tool import Point

from atoll.errors import AtollError, StorageFailed
from atoll.layout import Layout
from atoll.model.state import Phase
from atoll.platform.local import LocalHost

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(500), pytest.mark.usefixtures("short_chains")]

MIB = 1024**2


@pytest.mark.parametrize("name", ACTS)
async def test_a_full_disk_at_any_step_is_told_and_nothing_is_lost(name: str, small_home: Path, layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    act, filler = ACTS[name], small_home / "filler"
    moments: list[Point | None] = [None, *faults.points(*act.verbs, moments=("before",))]
    async with Factory(layout) as factory:
        at = await kept(factory)
        for point in moments:
            for leave in (0, 5 * MIB) if act.copies else (0,):
                where = f"{name}: full but for {leave} bytes at {point}"
                await act.prepare(at)
                with faults.at(point or ("", "", ""), lambda leave=leave: faults.fill(filler, leave=leave)) as reached:
                    if point is None:
                        faults.fill(filler, leave=leave)
                    try:
                        await act.do(at)
                        error = None
                    except AtollError as caught:
                        error = caught
                assert reached or point is None, where
                filler.unlink()
                # The machine that it was done to never stopped.
                assert await at.vm.phase() is Phase.RUNNING, where
                await settled(layout)
                if error is None:
                    await check_made(name, at)
                else:
                    assert isinstance(error, StorageFailed), where
                    assert re.search("No space left|disk is full|doesn't fit", error.text), f"{where}: {error.text}"
                await at.is_whole()
                await nothing_is_left(factory)
                await at.drop_copy(of=at.first if act.of_first else at.now)
                await cleared(at)
        # And once there is room it is done as ever.
        await act.prepare(at)
        await act.do(at)
        await check_made(name, at)
        await at.is_whole()
        await nothing_is_left(factory)


async def settled(layout: Layout) -> None:
    """What couldn't be ended while the disk was full is ended by the next command, and told."""
    async with LocalHost(layout) as host:
        for operation in await host.operations.ls(unfinished=True):
            assert operation.state == "stuck", operation
            await host.operations.retry(operation.id)


async def test_a_full_disk_elsewhere_is_told_as_that_one(small_home: Path, layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    elsewhere = small_home / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", elsewhere], check=True)
    try:
        async with Factory(layout) as factory:
            at = await kept(factory)
            with pytest.raises(StorageFailed, match=f"can't write to {elsewhere}/backups: No space .*--in {elsewhere}"):
                await at.vm.backup(elsewhere / "backups")
            with pytest.raises(StorageFailed, match=f"can't write {elsewhere}/bundle: No space"):
                await at.vm.export(elsewhere / "bundle")
            assert not [path for path in elsewhere.rglob("*") if path.is_file() and path.stat().st_size > 1000]
            assert await at.vm.phase() is Phase.RUNNING
            await at.is_whole()
            await nothing_is_left(factory)
    finally:
        subprocess.run(["umount", "--lazy", elsewhere], check=True)
