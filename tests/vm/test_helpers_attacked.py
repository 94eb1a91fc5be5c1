"""What a program behind the barriers of each helper can't do: a hostile stand-in in its place, with its filters."""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
from msgspec.structs import fields
from tests.helpers.confined import Helper, Outcome, Trial
from tests.helpers.person import WITH_IDS, somebody
from tests.helpers.root import only_root
from tests.helpers.victims import REPOSITORY, Victims, filters_of, try_all, write_table

from atoll.host import cables, facts, namespace, slirp, user_network
from atoll.host.kernel import landlock_version
from atoll.layout import Layout, find
from atoll.model.names import new_id
from atoll.model.units import GIB, MIB

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="attacks go by x86-64 numbers"),
    only_root("victims and attackers are root and other users"),
]
PAGE = REPOSITORY / "docs/security.md"
KINDS: tuple[str, ...] = get_args(next(each.type for each in fields(Helper) if each.name == "kind"))
NIC, UPLINK, NAMES, RELAY, FOLDER = KINDS
OPEN = {
    "TCP to the host's loopback": {NIC, UPLINK},
    "UDP to the host's loopback": {NIC, UPLINK},
    "TCP to the host's network": {NIC, UPLINK},
    "raw socket": {NAMES},
    "fill the disk": {FOLDER},
}
"""What isn't blocked, and the page says why."""


@contextmanager
def helpers_at_work(uid: int) -> Iterator[tuple[int, dict[str, tuple[str, ...]]]]:
    """The holder of a real network of that user, and the filters of system calls that its helpers have."""
    with somebody(uid) as person:
        person.environment["ATOLL_HOME"] = str(person.home)
        person.atoll("image", "build", "tiny", "--quiet")
        network = json.loads(person.atoll("net", "create", "lab", "--mode", "nat", "--format", "json"))
        words = ("run", "tiny", "--name", "v", "--memory", "96MiB", "--network", "user", "--network", "lab")
        told = json.loads(person.atoll(*words, "--quiet", "--format", "json"))
        person.atoll("net", "impair", "v", "--network", "lab", "--delay", "1ms")
        layout = find({"ATOLL_HOME": str(person.home)})
        try:
            yield helpers_of(layout, network["id"], told["vm"]["id"])
        finally:
            person.atoll("rm", "--force", "v")
            person.atoll("net", "rm", "lab")


def helpers_of(layout: Layout, network_id: str, vm_id: str) -> tuple[int, dict[str, tuple[str, ...]]]:
    paths = layout.network(network_id)
    holder, nic = namespace.holder_of(paths), user_network.helper_of(layout.vm(vm_id).network_control("net0"))
    uplink = slirp.listener(paths.uplink)
    relay = int(subprocess.run(["pgrep", "-f", f"{cables.MARK} {network_id}"], capture_output=True, check=True).stdout)
    assert holder is not None and nic is not None and uplink is not None
    pids = {NIC: nic, UPLINK: uplink, NAMES: holder.pid, RELAY: relay}
    filters = {kind: filters_of(pid) for kind, pid in pids.items()}
    assert [len(each) for each in filters.values()] == [2, 2, 1, 1], "ours, and slirp4netns's own"
    assert all(facts.identity_of(pid) for pid in pids.values())
    return holder.pid, filters


def attempt(kind: str, victims: Victims, holder: int, filters: tuple[str, ...]) -> Outcome:
    workplace = Path(tempfile.mkdtemp(prefix="atoll-test-", dir=victims.folder))
    workplace.chmod(0o777)
    os.chown(workplace, victims.owner, victims.owner)
    trial = Trial(
        vm_id=new_id(), memory=1536 * MIB, disk_size=1 * GIB, disk=str(victims.folder / "own-disk"),
        helper=Helper(kind=kind, folder=str(workplace), holder=holder), targets=victims.targets(), filters=filters,
    )  # type: ignore[arg-type] # fmt: skip
    outcome = try_all(trial, user=victims.owner)
    shutil.rmtree(workplace)
    return outcome


async def of_all_helpers(uid: int) -> dict[str, Outcome]:
    victims = Victims(owner=uid)
    try:
        with helpers_at_work(uid) as (holder, filters):
            return {
                kind: await asyncio.to_thread(attempt, kind, victims, holder, filters.get(kind, ())) for kind in KINDS
            }
    finally:
        victims.close()


async def test_a_helper_reaches_its_network_and_nothing_else() -> None:
    outcomes = {uid: await of_all_helpers(uid) for uid in (0, WITH_IDS)}
    for of_user in outcomes.values():
        assert all(outcome.missing == () for outcome in of_user.values())
        attacks = next(iter(of_user.values())).blocked
        succeeded = {
            name: kinds
            for name in attacks
            if (kinds := {kind for kind in KINDS if of_user[kind].blocked[name] == "open"})
        }
        assert succeeded == OPEN
    if "ATOLL_UPDATE_DOCS" in os.environ:
        about = f"Linux {os.uname().release}, Landlock {landlock_version()}; as root's, and as an ordinary user's."
        write_table(PAGE, "attacks on helpers", above=[about], rows=table(outcomes))


def table(outcomes: dict[int, dict[str, Outcome]]) -> list[list[str]]:
    """What came of each attack as each helper; where that isn't the same for both, root's comes first."""
    attacks = outcomes[0][NIC].blocked
    rows = [[name, *(" / ".join(dict.fromkeys(of[kind].blocked[name] for of in outcomes.values())) for kind in KINDS)]
            for name in attacks]  # fmt: skip
    return [["attack", *KINDS], *rows]
