"""The disk of the records and of what runs is full at every step of the verbs of networks and shared folders: it is
told, the machine goes on, and with room it is done as ever.
"""

import re
from pathlib import Path

import pytest
from tests.helpers import faults
from tests.helpers.images import adopt_cached
from tests.helpers.machines import Factory
from tests.helpers.ports import free_port
from tests.helpers.tool import Point
from tests.helpers.world import disagreements
from tests.vm.test_failures_full_disk import settled
from tests.vm.test_failures_tool_killed import CASES, Stage, action_of

from atoll.errors import AtollError
from atoll.layout import Layout
from atoll.model import requests
from atoll.model.state import Phase
from atoll.platform.local import LocalHost

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(300)]

VERBS = sorted(name for name in CASES if name.startswith(("net ", "share ")))


async def done(stage: Stage, action: str) -> AtollError | None:
    """Do a case's action in this process."""
    named: dict[str, object] = {name: getattr(requests, name) for name in ("ShareRequest", "NicSetRequest")}
    exec(f"async def act(host):\n    {action}", named)
    try:
        await named["act"](stage.factory.host)  # type: ignore[operator]
    except AtollError as error:
        return error
    return None


@pytest.mark.parametrize("name", VERBS)
async def test_a_full_disk_at_any_step_is_told_and_mended_with_room(
    name: str, small_home: Path, layout: Layout
) -> None:
    await adopt_cached("tiny", layout)
    case, filler = CASES[name], small_home / "filler"
    moments: list[Point | None] = [None, *faults.points(name, moments=("before",))]
    async with Factory(layout) as factory:
        stage = Stage(factory, free_port())
        for point in moments:
            where = f"{name}: full at {point}"
            await case.prepare(stage)
            with faults.at(point or ("", "", ""), lambda: faults.fill(filler)) as reached:
                if point is None:
                    faults.fill(filler)
                error = await done(stage, action_of(case, stage))
            assert reached or point is None, where
            filler.unlink()
            for info in await factory.host.ls():
                assert info.phase is Phase.RUNNING, where
            await settled(layout)
            if error is not None:
                assert re.search("No space left|disk is full", error.text), f"{where}: {error.text}"
            assert await disagreements(layout) == [], where
            async with LocalHost(layout) as host:
                assert await host.fsck() == [], where
            if error is None:
                assert await case.effect(stage), where
        await case.prepare(stage)
        assert await done(stage, action_of(case, stage)) is None
        assert await case.effect(stage)
