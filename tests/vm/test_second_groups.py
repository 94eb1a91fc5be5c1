"""Control groups of the second version, in a guest: whatever this computer has, a guest's kernel has them all."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers.machines import Factory, Machine

from atoll.model.requests import ShareRequest

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(300)]
REPOSITORY = Path(__file__).parent.parent.parent
USER = 1000
# As systemd has it: a login by SSH in a group of root's, and beside it the user's manager with a part of its own.
TREE = f"""
mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && cd /sys/fs/cgroup
mkdir -p user.slice/user-{USER}.slice/session-1.scope
echo '+cpu +memory +pids' | tee cgroup.subtree_control user.slice/cgroup.subtree_control >/dev/null
echo '+cpu +memory +pids' >user.slice/user-{USER}.slice/cgroup.subtree_control
cd user.slice/user-{USER}.slice
mkdir -p user@{USER}.service/app.slice/terminal.scope user@{USER}.service/init.scope
chown -R {USER} user@{USER}.service
chown root user@{USER}.service/memory.max user@{USER}.service/cpu.max user@{USER}.service/pids.max
"""
SLICE = f"user.slice/user-{USER}.slice"


async def python(vm: Machine, user: int, group: str) -> dict[str, Any]:
    """This computer's Python and Atoll, in the guest."""
    libraries = Path(msgspec.__file__).parent.parent
    variables = "LD_LIBRARY_PATH=/r/usr/lib/x86_64-linux-gnu PYTHONHOME=/r/usr PYTHONDONTWRITEBYTECODE=1"
    paths = f"PYTHONPATH=/r/work/src:/r/work/{libraries.relative_to(REPOSITORY)}"
    script = "/r/work/tests/helpers/second_groups.py"
    told: dict[str, Any] = json.loads(await vm.sh(f"{variables} {paths} /r/usr/bin/python3 -S {script} {user} {group}"))
    return told


async def test_who_may_divide_a_group_gets_limits_and_others_are_told(factory: Factory) -> None:
    if not Path("/usr/bin/python3").exists() or not Path(msgspec.__file__).is_relative_to(REPOSITORY):
        pytest.skip("the guest gets this computer's Python and this checkout's libraries")
    shares = tuple(
        ShareRequest(host_path=host, guest_path=guest, read_only=True)
        for host, guest in (("/usr", "/r/usr"), (str(REPOSITORY), "/r/work"))
    )
    vm = await factory.run("tiny", name="v", memory="256MiB", shares=shares)
    await vm.sh(TREE)
    root = await python(vm, 0, f"{SLICE}/session-1.scope")
    assert root["folder"] == "/sys/fs/cgroup/atoll"
    desktop = await python(vm, USER, f"{SLICE}/user@{USER}.service/app.slice/terminal.scope")
    assert desktop["folder"] == f"/sys/fs/cgroup/{SLICE}/user@{USER}.service/atoll"
    for told in (root, desktop):
        assert told["bounded"] == told["writable"] == ["cpu", "memory", "pids"]
        assert told["settings"] == {
            "pids.max": "10", "cpu.max": "20000 100000", "cpu.weight": "50", "memory.max": str(64 << 20)
        }  # fmt: skip
        # A fifth of a processor, and what it takes until it is in the group; without that it gets nearly all.
        assert told["found again"] and told["share"] < 0.6
        assert (told["changed"], told["then"], told["left"]) == ("", "50000 100000", [])
    login = await python(vm, USER, f"{SLICE}/session-1.scope")
    assert (login["version"], login["bounded"], login["writable"], login["left"]) == (1, [], [], [])
