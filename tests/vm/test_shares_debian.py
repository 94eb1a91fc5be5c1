"""Shared folders in a Debian guest as Atoll builds it, with systemd: mounted, written both ways, and kept through a
snapshot, a restore, a fork, and an agent that is started anew.
"""

import asyncio
import os
from pathlib import Path

import pytest
from tests.helpers.machines import Factory
from tests.vm.test_shares import folder as folder
from tests.vm.test_shares import server, shared, states

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("release", ["12", "13"])
async def test_a_folder_in_debian(release: str, factory: Factory, folder: Path) -> None:
    (folder / "from here").write_text("hello")
    vm = await factory.create(f"debian:{release}", name="v", memory="512MiB", shares=(shared(folder),))
    await vm.start(wait=True, timeout=400)
    assert await states(vm) == ["shared"]
    assert await vm.read("'/mnt/data/from here'") == "hello"
    await vm.write("/mnt/data/there", "written by systemd's guest")
    assert (folder / "there").read_text() == "written by systemd's guest"
    assert (folder / "there").stat().st_uid == os.geteuid()
    # It isn't the agent's: its service may end.
    await vm.sh("systemd-run --on-active=1 systemctl restart qemu-guest-agent")
    await asyncio.sleep(5)
    await vm.wait("ready", timeout=60)
    assert await vm.read("/mnt/data/there") == "written by systemd's guest"

    await vm.snapshot("s")
    (folder / "there").write_text("changed here")
    await vm.restore("s")
    assert await states(vm) == ["shared"]
    assert await vm.read("/mnt/data/there") == "changed here"
    (fork,) = [factory.machine(each) for each in await vm.fork(1, name="w")]
    assert await states(fork) == ["shared"]
    await fork.write("/mnt/data/of-w", "w")
    assert await vm.read("/mnt/data/of-w") == "w"
    assert server(vm) != server(fork)
    await vm.share_rm("/mnt/data")
    assert await vm.sh("ls /mnt/data") == ""
    assert await fork.read("/mnt/data/of-w") == "w"
