"""What a program behind the barriers of a real VM can't do: each attack with all barriers, and with each alone."""

import asyncio
import os
from collections.abc import Iterator

import pytest
from tests.helpers.confined import LAYERS, Outcome, Trial
from tests.helpers.machines import Factory
from tests.helpers.root import only_root
from tests.helpers.victims import REPOSITORY, Victims, filters_of, open_in, try_all, write_table

from atoll.host.kernel import landlock_version
from atoll.model.names import new_id
from atoll.model.units import GIB, MIB

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="attacks go by x86-64 numbers"),
    only_root("victims and attackers are root and other users"),
]
USER = 54321
PAGE = REPOSITORY / "docs/security.md"


@pytest.fixture(params=[0, USER], ids=["root", "user"])
def victims(request: pytest.FixtureRequest) -> Iterator[Victims]:
    made = Victims(owner=request.param)
    try:
        yield made
    finally:
        made.close()


def attempt(
    victims: Victims, filters: tuple[str, ...], *, layers: tuple[str, ...] = LAYERS, namespaces: bool = True
) -> Outcome:
    trial = Trial(
        vm_id=new_id(), memory=1536 * MIB, disk_size=1 * GIB, disk=str(victims.folder / "own-disk"), layers=layers,
        namespaces=namespaces, targets=victims.targets(), filters=filters,
    )  # fmt: skip
    return try_all(trial, user=victims.owner)


async def filters_of_a_vm(factory: Factory) -> tuple[str, ...]:
    vm = await factory.run("tiny", memory="128MiB")
    found = await asyncio.to_thread(filters_of, vm.pid)
    await vm.rm(force=True)
    assert len(found) == 2, "ours and QEMU's own"
    return found


async def test_no_attack_succeeds_behind_all_barriers(factory: Factory, victims: Victims) -> None:
    filters = await filters_of_a_vm(factory)
    shut_in = await asyncio.to_thread(attempt, victims, filters)
    # Without subordinate ids an ordinary user has no other user to give; the namespaces do for it.
    assert set(shut_in.missing) <= {"own user", "landlock"}
    assert open_in(shut_in) == []
    if "ATOLL_UPDATE_DOCS" in os.environ and victims.owner == 0:
        alone = [await asyncio.to_thread(attempt, victims, filters, layers=(LAYERS[0], layer)) for layer in LAYERS]
        about = f"Linux {os.uname().release}, Landlock {landlock_version()}; as root's VM."
        write_table(PAGE, "attacks", above=[about], rows=table(shut_in, alone))


async def test_no_attack_succeeds_where_user_namespaces_are_refused(factory: Factory, victims: Victims) -> None:
    filters = await filters_of_a_vm(factory)
    shut_in = await asyncio.to_thread(attempt, victims, filters, namespaces=False)
    assert {"namespaces", "empty root"} <= set(shut_in.missing)
    # It says what it doesn't block: a limit on an ordinary user's processes would count those outside as well.
    assert open_in(shut_in) == (["thread bomb"] if "process limit" in shut_in.missing else [])


def table(shut_in: Outcome, alone: list[Outcome]) -> list[list[str]]:
    """What came of each attack, with all barriers and with each alone."""
    return [
        ["attack", "all barriers", *LAYERS],
        *(
            [name, said, *("" if each.blocked[name] == "open" else each.blocked[name] for each in alone)]
            for name, said in shut_in.blocked.items()
        ),
    ]
