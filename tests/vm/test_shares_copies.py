"""Shared folders of machines that were copied, brought back or left without their folder, and what a folder may have in
it: links that lead out, large files, files of others.
"""

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from tests.helpers.machines import Factory, Machine
from tests.helpers.person import USER, WITH_IDS, somebody, subordinate_of
from tests.vm.test_shares import folder as folder
from tests.vm.test_shares import server, shared, states

from atoll.errors import InvalidInput

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)]

MIB = 1024**2


async def test_copies_from_a_pool_and_of_a_backup(factory: Factory, folder: Path, home: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB", shares=(shared(folder),))
    await vm.write("/mnt/data/of-v", "v")
    await vm.snapshot("s")
    await factory.host.pools.fill("v@s", 1)
    taken = factory.machine(await factory.host.pools.take("v@s", "taken"))
    assert await states(taken) == ["shared"]
    await taken.write("/mnt/data/of-taken", "taken")
    assert await vm.read("/mnt/data/of-taken") == "taken"
    assert server(vm) != server(taken)
    await vm.backup(home / "backups")
    back = factory.machine(await factory.host.backups.restore(home / "backups", "v", "back"))
    assert await back.shares() == [], "what a backup says of folders may be another computer's"
    await back.start(wait=True)
    assert (await back.share_add(shared(folder))).state == "shared"
    assert await back.sh("ls /mnt/data") == "of-taken\nof-v"
    # Copies that write one file at the same time: each line is there once.
    copies = (vm, taken, back)
    lines = "for i in $(seq 50); do echo {0} $i >>/mnt/data/log-{0}; done; cat /mnt/data/log-{0} | wc -l"
    assert await asyncio.gather(*(each.sh(lines.format(number)) for number, each in enumerate(copies))) == ["50"] * 3


async def test_a_restored_guest_sees_what_is_there_now(factory: Factory, folder: Path) -> None:
    (folder / "x").write_text("before")
    vm = await factory.run("tiny", name="v", memory="96MiB", shares=(shared(folder),))
    assert await vm.read("/mnt/data/x") == "before"
    await vm.sh("(while :; do date >>/mnt/data/written || exit; done) >/dev/null 2>&1 &")
    await vm.snapshot("s")
    (folder / "x").write_text("after!")
    (folder / "new").write_text("")
    await vm.restore("s")
    assert await vm.read("/mnt/data/x") == "after!", "the guest's memory had it as it was"
    assert "new" in await vm.sh("ls /mnt/data")
    assert (folder / "written").stat().st_size > 0


async def test_links_out_of_a_folder_lead_nowhere(factory: Factory, folder: Path) -> None:
    secret = folder.with_name("secret")
    secret.mkdir()
    (secret / "x").write_text("secret")
    (folder / "absolute").symlink_to(secret)
    (folder / "up").symlink_to("../secret")
    (folder / "inside").symlink_to("real")
    (folder / "real").write_text("real")
    vm = await factory.run("tiny", name="v", memory="96MiB", shares=(shared(folder),))
    assert await vm.read("/mnt/data/inside") == "real"
    # Those that the guest makes are texts here, and nothing more.
    await vm.sh(f"ln -s {secret} /mnt/data/made; mkdir -p /mnt/secret; echo the guest >/mnt/secret/x")
    assert (folder / "made").readlink() == secret
    for name in ("absolute", "up", "made"):
        assert (await vm.exec(["cat", f"/mnt/data/{name}/x"])).text != "secret"
        assert (await vm.exec(["sh", "-c", f"echo no >/mnt/data/{name}/y"])).exit_code != 0
    assert [(path.name, path.read_text()) for path in secret.iterdir()] == [("x", "secret")]


def peak(pid: int) -> int:
    """The most memory that a process has had."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


async def test_a_large_file_takes_no_memory_here(factory: Factory, folder: Path) -> None:
    with (folder / "large").open("wb") as file:
        file.truncate(300 * MIB)
        file.seek(300 * MIB - 4)
        file.write(b"last")
    vm = await factory.run("tiny", name="v", memory="128MiB", shares=(shared(folder),))
    assert await vm.sh("wc -c </mnt/data/large; tail -c 4 /mnt/data/large") == f"{300 * MIB}\nlast"
    await vm.sh("dd if=/mnt/data/large of=/mnt/data/copy bs=1M 2>/dev/null")
    assert (folder / "copy").stat().st_size == 300 * MIB
    assert peak(server(vm).pid) < 16 * MIB


async def test_a_folder_that_goes_while_it_is_shared(factory: Factory, folder: Path) -> None:
    (folder / "x").write_text("first")
    vm = await factory.run("tiny", name="v", memory="96MiB", shares=(shared(folder),))
    shutil.rmtree(folder)
    assert await states(vm) == ["not-mounted"]
    async with asyncio.timeout(60):
        assert (await vm.exec(["cat", "/mnt/data/x"])).exit_code != 0, "it doesn't hang, and the VM can be used"
    with pytest.raises(InvalidInput, match="there is no such folder"):
        await vm.share_add(shared(folder))
    folder.mkdir()
    (folder / "x").write_text("second")
    assert await vm.read("/mnt/data/x") == "second", "exec mounts the one that is there now"
    assert await states(vm) == ["shared"]


@pytest.mark.parametrize("uid", [USER, WITH_IDS])
def test_files_belong_to_who_shares_them(uid: int) -> None:
    with somebody(uid) as person:
        subordinate_of(uid)
        folder = person.home / "shared"
        folder.mkdir()
        os.chown(folder, uid, uid)
        person.atoll("image", "build", "tiny", "--quiet")
        person.atoll("run", "tiny", "--name", "v", "--memory", "96MiB", "--quiet", "-v", f"{folder}:/mnt/s")
        words = "echo x >/mnt/s/made; chown 1000:1000 /mnt/s/made 2>/dev/null; stat -c %u:%g /mnt/s/made"
        assert person.atoll("exec", "v", "--", "sh", "-c", words) == b"0:0\n"
        assert (folder / "made").stat().st_uid == uid
        (folder / "private").write_text("root's")
        (folder / "private").chmod(0o600)
        assert person.run("cat", folder / "private").returncode != 0
        assert "Permission denied" in person.refused("exec", "v", "--", "cat", "/mnt/s/private")
        person.atoll("rm", "--force", "v")


async def test_roots_vm_is_the_folders_owner(factory: Factory, folder: Path) -> None:
    os.chown(folder, USER, USER)
    vm: Machine = await factory.run("tiny", name="v", memory="96MiB", shares=(shared(folder),))
    await vm.write("/mnt/data/made", "x")
    assert (folder / "made").stat().st_uid == USER
    (folder / "private").write_text("root's")
    (folder / "private").chmod(0o600)
    assert (await vm.exec(["cat", "/mnt/data/private"])).exit_code != 0
