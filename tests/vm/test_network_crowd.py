"""Fifty machines on one network: forks, which have addresses of their own. Takes some minutes."""

import subprocess
import time
from pathlib import Path

import pytest
from tests.helpers.machines import Factory, Machine
from tests.helpers.world import disagreements

from atoll.host import facts, namespace
from atoll.layout import NetworkPaths
from atoll.model.network import Network
from atoll.model.requests import NicRequest

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(1500)]

CROWD = 50
HELPERS_MAY_TAKE = 32 << 20
"""Bytes of the holder and dnsmasq together, however many VMs there are."""


async def reaches(vm: Machine, name: str) -> None:
    await vm.sh(f"for i in 1 2 3 4 5 6; do ping -c 1 -W 5 {name} && exit 0; sleep 1; done; exit 1")


def memory_of_helpers(network: Network, paths: NetworkPaths) -> int:
    """What they have of their own."""
    found = subprocess.run(["pgrep", "-f", str(paths.names)], capture_output=True, check=True).stdout.split()
    total = 0
    for pid in found:
        lines = Path(f"/proc/{pid.decode()}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))
    return total


async def test_fifty_machines_find_each_other_by_name(factory: Factory) -> None:
    began = time.monotonic()
    network = await factory.host.networks.create("lab")
    paths = factory.layout.network(network.id)
    first = await factory.run("tiny", name="n-0", memory="96MiB", nics=(NicRequest(network="lab"),))
    alone = memory_of_helpers(network, paths)
    made = await first.fork(CROWD - 1, name="n-{n}")
    machines = [first, *(factory.machine(each) for each in made)]  # type: ignore[arg-type]
    forked = time.monotonic()
    addresses = {each.record.spec.nics[0].address for each in machines}
    assert len(addresses) == CROWD
    for each, other in zip(machines, [*machines[1:], machines[0]], strict=True):
        await reaches(each, other.name)
    pinged = time.monotonic()
    together = memory_of_helpers(network, paths)
    assert together < HELPERS_MAY_TAKE

    # Names follow.
    await machines[7].rename("renamed")
    await reaches(machines[8], "renamed")
    await machines[9].rm(force=True)
    await machines[8].sh("for i in $(seq 50); do nslookup n-9 >/dev/null 2>&1 || exit 0; sleep 0.2; done; exit 1")
    assert await disagreements(factory.layout) == []

    holder = namespace.holder_of(paths)
    assert holder is not None
    for each in machines[:9] + machines[10:]:
        await each.rm(force=True)
    await factory.host.networks.rm("lab")
    assert not facts.is_alive(holder) and not paths.run.exists()
    assert await disagreements(factory.layout) == []
    print(
        f"{CROWD} machines: forked after {forked - began:.0f} s, pinged in {pinged - forked:.0f} s, all in "
        f"{time.monotonic() - began:.0f} s; helpers {alone >> 10} KiB with one, {together >> 10} KiB with all"
    )
