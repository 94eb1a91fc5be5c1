"""Backups in a folder: each has the content of its instant, only what changed is copied, nothing half is ever taken."""

import asyncio
import hashlib
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
from msgspec.structs import replace
from tests.helpers import leftovers, tool
from tests.helpers.command import ATOLL, all_at_once, atoll
from tests.helpers.machines import Factory
from tests.helpers.root import small_file_system
from tests.helpers.world import disagreements

from atoll.errors import AlreadyExists, InvalidInput, NotFound, StorageFailed, Unsupported, WrongState
from atoll.layout import Layout
from atoll.model.backup import Backup, Keep
from atoll.model.requests import CreateRequest, DiskRequest
from atoll.model.spec import PortSpec
from atoll.model.state import Phase
from atoll.operations.merge import merge
from atoll.operations.services import Services
from atoll.platform.local import LocalHost

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

MIB = 1024**2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "the backups, of 'all' ü"


@pytest.fixture
async def elsewhere(tmp_path: Path) -> AsyncIterator[Factory]:
    """Another home, that knows nothing of the first one."""
    home = tmp_path / "elsewhere"
    async with AsyncExitStack() as stack:
        stack.callback(leftovers.end_processes_of, home)
        layout = Layout(data=home / "data", cache=home / "cache", run=home / "run")
        yield await stack.enter_async_context(Factory(layout))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def layers_in(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "layers").glob("*.qcow2")}


async def test_a_running_vm_is_backed_up_twice_and_each_has_its_instant(
    factory: Factory, elsewhere: Factory, folder: Path
) -> None:
    disks = (DiskRequest(name="data", size="64MiB"), DiskRequest(name="blank", size="8MiB"))
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=disks)
    await vm.sh("echo one > /root/file; printf first | dd of=/dev/vdb conv=notrunc 2>/dev/null; sync; echo up > /tmp/m")
    first = await vm.backup(folder, message="the first")
    whole = bytes_in(folder)
    assert [disk.chain for disk in first.disks if disk.name == "blank"] == [()], "a disk without data has no layer"
    assert first.added == first.size and whole >= first.size * 0.8

    await vm.sh("dd if=/dev/urandom of=/root/big bs=1M count=8 2>/dev/null; echo two > /root/file; sync")
    content = await vm.sh("sha256sum /root/big")
    before = set(layers_in(folder))
    second = await vm.backup(folder)
    changed = bytes_in(folder) - whole
    assert 8 * MIB <= changed <= 10 * MIB, "only what changed was copied"
    assert len(layers_in(folder) - before) == 1, "the other disks hadn't changed"
    assert await vm.read("/tmp/m") == "up", "it went on"
    await vm.sh("echo three > /root/file; sync")

    for backup, text, name in ((first, "one", None), (second, "two", "copy")):
        made = elsewhere.machine(await elsewhere.host.backups.restore(folder, backup.id, name))  # type: ignore[arg-type]
        assert (made.name, await made.phase()) == (name or "v", Phase.STOPPED)
        assert await disagreements(elsewhere.layout) == []
        await made.start(wait=True, timeout=120)
        assert await made.read("/root/file") == text
        assert await made.sh("head -c 5 /dev/vdb") == "first"
        assert await made.sh("cat /sys/block/vdb/size /sys/block/vdc/size") == "131072\n16384"
        if backup is second:
            assert await made.sh("sha256sum /root/big") == content
    assert await disagreements(factory.layout) == []
    assert await disagreements(elsewhere.layout) == []


@pytest.mark.slow
async def test_restoring_shares_what_is_here_already(factory: Factory, folder: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.publish(PortSpec(host_port=18080, guest_port=80))
    await vm.sh("echo one > /root/file; sync")
    backup = await vm.backup(folder)
    layers = set(factory.layout.layers.iterdir())
    with pytest.raises(AlreadyExists, match="there is a VM 'v' already"):
        await factory.host.backups.restore(folder)
    copy = factory.machine(await factory.host.backups.restore(folder, "v", "copy"))  # type: ignore[arg-type]
    assert set(factory.layout.layers.iterdir()) == layers, "nothing was copied"
    assert copy.record.spec.disks[0].layer == backup.spec.disks[0].layer
    assert copy.record.spec.nics[0].mac != vm.record.spec.nics[0].mac
    assert await copy.ports() == []
    await vm.rm(force=True)
    again = factory.machine(await factory.host.backups.restore(folder))  # type: ignore[arg-type]
    assert again.record.spec.nics[0] == backup.spec.nics[0], "its address and its port are free again"
    await again.start(wait=True, timeout=120)
    assert await again.read("/root/file") == "one"
    assert await disagreements(factory.layout) == []


async def test_what_is_damaged_is_found_and_refused_with_nothing_changed(
    factory: Factory, elsewhere: Factory, folder: Path
) -> None:
    vm = await factory.create("tiny", name="v")
    first = await vm.backup(folder)
    second = await vm.backup(folder)
    assert (await factory.host.backups.verify(folder)).damages == ()
    layer = folder / "layers" / f"{first.layers[0].id}.qcow2"
    content = layer.read_bytes()
    layer.chmod(0o644)
    layer.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = await elsewhere.host.backups.verify(folder)
    assert [(d.path, d.backups) for d in found.damages] == [(str(layer), (first.id, second.id))]
    with pytest.raises(StorageFailed, match=r"its checksum is another.*Nothing was changed"):
        await elsewhere.host.backups.restore(folder)
    assert await elsewhere.host.ls() == []
    assert await disagreements(elsewhere.layout) == []
    told = await asyncio.to_thread(atoll, "backup", "verify", "--in", str(folder))
    assert told.code == 1 and "0 of 2 backups are whole" in told.out and str(layer) in told.err

    layer.unlink()
    assert len((await elsewhere.host.backups.verify(folder, "v")).damages) == 1
    third = await vm.backup(folder)
    assert layer.read_bytes() == content, "what is missing is copied again"
    assert (await factory.host.backups.verify(folder)).damages == ()

    manifest = folder / "backups" / vm.id / f"{third.id}.json"
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text().replace('"v"', '"w"'))
    damages = (await elsewhere.host.backups.verify(folder)).damages
    assert [(d.path, d.backups) for d in damages] == [(str(manifest), (third.id,))]
    assert [b.id for b in await elsewhere.host.backups.ls(folder)] == [first.id, second.id]
    with pytest.raises(StorageFailed, match="the newest backup of v can't be read"):
        await elsewhere.host.backups.restore(folder, "v")
    with pytest.raises(StorageFailed, match="can't be pruned"):
        await elsewhere.host.backups.prune(folder, "v", Keep(last=1))
    await elsewhere.host.backups.restore(folder, second.id)
    assert await disagreements(elsewhere.layout) == []


@pytest.mark.parametrize(
    ("part", "value"), [("mac", "52:54:00:00:00:01 accept"), ("name", "../../../tmp/x"), ("name", "net0\nx")]
)
async def test_a_machine_that_can_t_be_is_refused(factory: Factory, folder: Path, part: str, value: str) -> None:
    """Whoever can write to the folder can make manifests, checksum and all."""
    vm = await factory.create("tiny", name="v")
    backup = await vm.backup(folder)
    path = folder / "backups" / vm.id / f"{backup.id}.json"
    content = json.loads(path.read_text())["backup"]
    content["spec"]["nics"][0][part] = value
    forged = json.dumps(content, separators=(",", ":"))
    path.chmod(0o644)
    path.write_text(f'{{"sha256":"{hashlib.sha256(forged.encode()).hexdigest()}","backup":{forged}}}')
    with pytest.raises(StorageFailed, match=r"its machine can't be: .*the network card"):
        await factory.host.backups.restore(folder, name="w")
    assert [info.vm.name for info in await factory.host.ls()] == ["v"]


@pytest.mark.slow
async def test_prune_keeps_what_the_kept_ones_need(factory: Factory, elsewhere: Factory, folder: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    other = await factory.create("tiny", name="other")
    made = []
    for number in range(3):
        await vm.sh(f"dd if=/dev/urandom of=/root/big bs=1M count=4 2>/dev/null; echo {number} > /root/file; sync")
        made.append(await vm.backup(folder))
    await other.backup(folder)
    before = files_in(folder)
    with pytest.raises(InvalidInput, match="that would remove every backup"):
        await factory.host.backups.prune(folder, "v", Keep())
    dry = await factory.host.backups.prune(folder, "v", Keep(last=1), dry_run=True)
    assert files_in(folder) == before
    pruned = await factory.host.backups.prune(folder, "v", Keep(last=1))
    assert (pruned.removed, pruned.freed) == (dry.removed, dry.freed) == ((made[0].id, made[1].id), dry.freed)
    assert pruned.freed == 0, "the last one stands on all layers of the others"
    assert [b.vm_name for b in await factory.host.backups.ls(folder)] == ["v", "other"]
    assert (await factory.host.backups.verify(folder)).damages == ()
    back = elsewhere.machine(await elsewhere.host.backups.restore(folder, "v"))  # type: ignore[arg-type]
    await back.start(wait=True, timeout=120)
    assert await back.read("/root/file") == "2"
    await vm.stop(force=True)
    # A VM that was rewound stands on other layers.
    await vm.rm()
    anew = await factory.create("tiny", name="v")
    await anew.backup(folder)
    freed = await factory.host.backups.prune(folder, "v", Keep(last=1, daily=1))
    assert freed.freed > 8 * MIB and freed.removed == (made[2].id,)
    assert (await factory.host.backups.verify(folder)).damages == ()


async def test_two_at_once_and_the_command_line(factory: Factory, folder: Path, tmp_path: Path) -> None:
    await factory.create("tiny", name="one")
    await factory.create("tiny", name="two")
    words = [["backup", name, "--to", str(folder)] for name in ("one", "two", "one")]
    ended = await asyncio.to_thread(all_at_once, words)
    assert [each.code for each in ended] == [0, 0, 0], ended
    listed = await asyncio.to_thread(atoll, "backup", "ls", "--in", str(folder), "--format", "json")
    backups = json.loads(listed.out)
    assert sorted(b["vm_name"] for b in backups) == ["one", "one", "two"]
    assert len(layers_in(folder)) == 1, "they have the image in common, and no data of their own"
    told = await asyncio.to_thread(atoll, "restore", "--from", str(folder), "two", "three")
    assert (told.code, told.out) == (0, "three\n"), told
    assert (await asyncio.to_thread(atoll, "restore", "--from", str(folder))).code == 2
    assert (await asyncio.to_thread(atoll, "restore", "one")).code == 2
    table = await asyncio.to_thread(atoll, "backup", "prune", "--in", str(folder), "one", "--keep-last", "1")
    assert table.code == 0 and "remove" in table.out and "Freed 0B" in table.out
    assert (await asyncio.to_thread(atoll, "backup", "verify", "--in", str(folder))).out.startswith("2 of 2 backups")
    assert (await asyncio.to_thread(atoll, "backup", "verify", "--in", str(tmp_path / "nothing"))).code == 3
    assert await disagreements(factory.layout) == []


async def test_a_killed_backup_leaves_a_valid_folder_and_the_next_one_clears_it(factory: Factory, folder: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("dd if=/dev/urandom of=/root/big bs=1M count=64 2>/dev/null; sync")
    action = f"await (await host.get('v')).backup({str(folder)!r})"
    process = tool.spawn(factory.layout, action)
    async with asyncio.timeout(120):
        while not any(path.stat().st_size for path in folder.glob("tmp/*-layer")):
            await asyncio.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    code, said = await asyncio.to_thread(tool.result, process)
    assert code == -9, said
    assert await factory.host.backups.ls(folder) == []
    assert (await factory.host.backups.verify(folder)).damages == ()
    (folder / "tmp" / "left").write_text("of another computer")
    backup = await vm.backup(folder)
    assert not any((folder / "tmp").iterdir())
    assert [b.id for b in await factory.host.backups.ls(folder)] == [backup.id]
    assert (await factory.host.backups.verify(folder)).damages == ()
    code, said = await asyncio.to_thread(tool.run, factory.layout, "pass")
    assert code == 0
    assert await disagreements(factory.layout) == []
    assert await vm.sh("echo alive") == "alive"


async def test_ctrl_c_ends_a_backup_and_leaves_nothing(factory: Factory, folder: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("dd if=/dev/urandom of=/root/big bs=1M count=64 2>/dev/null; sync")
    process = subprocess.Popen([*ATOLL, "backup", "v", "--to", str(folder)], stderr=subprocess.PIPE, text=True)
    async with asyncio.timeout(120):
        while not any(path.stat().st_size for path in folder.glob("tmp/*-layer")):
            await asyncio.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = await asyncio.to_thread(process.communicate, timeout=120)
    assert (process.returncode, said) == (130, "Error: cancelled: what it had begun was undone\n")
    assert not any((folder / "tmp").iterdir())
    assert await factory.host.backups.ls(folder) == []
    assert await disagreements(factory.layout) == []


@pytest.mark.slow
async def test_another_layer_with_the_same_id_is_never_taken_for_ours(factory: Factory, folder: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo one > /root/file; sync")
    await vm.backup(folder)
    layer = vm.record.spec.disks[0].layer or ""
    services = Services(factory.layout)
    try:
        record = services.records.layer(layer)
        assert record is not None and record.sha256, "its checksum is known since it was read"
        # As in a home that was copied before this layer was frozen, and went another way.
        services.records.put_layers([replace(record, sha256="0" * 64)])
        with pytest.raises(StorageFailed, match="has another layer"):
            await vm.backup(folder)
        services.records.put_layers([replace(record, sha256="")])
        await vm.backup(folder)
        assert services.records.layer(layer) == record
    finally:
        services.close()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_backup_killed_in_its_cut_is_undone_with_it(factory: Factory, folder: Path, moment: str) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    action = f"await (await host.get('v')).backup({str(folder)!r})"
    code, said = await asyncio.to_thread(tool.run, factory.layout, action, kill_at=("cut", "cut", moment))
    assert code == -9, said
    async with LocalHost(factory.layout) as host:
        assert sorted(notice.partition(" ")[0] for notice in host.notices()) == ["'backup", "'cut"]
    assert await disagreements(factory.layout) == []
    await vm.backup(folder)
    assert len(await factory.host.backups.ls(folder)) == 1


@pytest.mark.slow
async def test_a_paused_vm_is_backed_up_and_a_suspended_one_is_refused(
    factory: Factory, elsewhere: Factory, folder: Path
) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("echo kept > /root/file; sync; echo here > /tmp/m")
    await vm.pause()
    await vm.backup(folder)
    assert await vm.phase() is Phase.PAUSED
    await vm.resume()
    await vm.suspend()
    with pytest.raises(WrongState, match="it is suspended"):
        await vm.backup(folder)
    assert await vm.phase() is Phase.SUSPENDED
    await vm.resume()
    assert await vm.read("/tmp/m") == "here"
    back = elsewhere.machine(await elsewhere.host.backups.restore(folder))  # type: ignore[arg-type]
    await back.start(wait=True, timeout=120)
    assert await back.read("/root/file") == "kept"


@pytest.fixture
def small_folder(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    with small_file_system(folder, size="64m"):
        yield folder


async def test_a_folder_that_is_full_or_read_only_is_told_and_stays_valid(factory: Factory, small_folder: Path) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    first = await vm.backup(small_folder)
    await vm.sh("dd if=/dev/urandom of=/root/big bs=1M count=70 2>/dev/null; sync")
    with pytest.raises(StorageFailed, match=r"No space left.*atoll backup prune"):
        await vm.backup(small_folder)
    assert not any((small_folder / "tmp").iterdir())
    assert [b.id for b in await factory.host.backups.ls(small_folder)] == [first.id]
    assert (await factory.host.backups.verify(small_folder)).damages == ()
    subprocess.run(["mount", "-o", "remount,size=400m", small_folder], check=True)
    await vm.backup(small_folder)
    assert (await factory.host.backups.verify(small_folder)).damages == ()
    subprocess.run(["mount", "-o", "remount,ro", small_folder], check=True)
    with pytest.raises(StorageFailed, match="read-only: use another folder"):
        await vm.backup(small_folder)
    assert len(await factory.host.backups.ls(small_folder)) == 2, "reading needs no lock"
    assert await factory.host.operations.ls(unfinished=True) == []
    assert await disagreements(factory.layout) == []


async def test_folders_that_are_something_else_are_refused(factory: Factory, folder: Path, tmp_path: Path) -> None:
    vm = await factory.create("tiny", name="v")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "letter.txt").write_text("dear")
    file = tmp_path / "file"
    file.write_text("")
    for wrong in (strange, file, file / "below", ""):
        with pytest.raises((InvalidInput, StorageFailed)):
            await vm.backup(wrong)
    with pytest.raises(InvalidInput, match="has no backups"):
        await factory.host.backups.ls(strange)
    with pytest.raises(NotFound, match="there is no folder"):
        await factory.host.backups.ls(folder)
    await vm.backup(folder)
    marker = folder / "atoll-backup.json"
    marker.chmod(0o644)
    content = marker.read_text()
    marker.write_text('{"magic":"atoll-backup","format":2,"further":true}')
    for attempt in (vm.backup(folder), factory.host.backups.restore(folder), factory.host.backups.ls(folder)):
        with pytest.raises(Unsupported, match=r"is of a newer Atoll.*Upgrade"):
            await attempt
    marker.write_text(content)
    with pytest.raises(NotFound, match="there is no backup of 'w'"):
        await factory.host.backups.show(folder, "w")
    assert strange.joinpath("letter.txt").exists() and {p.name for p in strange.iterdir()} == {"letter.txt"}
    assert await disagreements(factory.layout) == []


@pytest.mark.slow
async def test_a_merged_layer_is_not_copied_again(
    factory: Factory, elsewhere: Factory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    for number in range(2):
        await vm.sh(f"dd if=/dev/urandom of=/root/big{number} bs=1M count=4 2>/dev/null; sync")
        await vm.backup(folder)
    content = await vm.sh("cat /root/big0 /root/big1 | sha256sum")
    await vm.stop(force=True)
    before = layers_in(folder)
    services = Services(factory.layout)
    try:
        merged = await _merge_upper_two(services)
    finally:
        services.close()
    await vm.start(wait=True, timeout=120)
    await vm.sh("echo later > /root/file; sync")
    backup = await vm.backup(folder)
    assert len(layers_in(folder) - before) == 1
    assert before < set(backup.disks[0].chain)
    back = elsewhere.machine(await elsewhere.host.backups.restore(folder))  # type: ignore[arg-type]
    await back.start(wait=True, timeout=120)
    assert await back.read("/root/file") == "later"
    assert await back.sh("cat /root/big0 /root/big1 | sha256sum") == content

    monkeypatch.setattr("atoll.operations.backup_files.LONGEST_STORED", 3)
    shorter = await vm.backup(folder)
    assert shorter.disks[0].chain[1] == merged, "a chain that became too long begins anew with what was merged"
    assert len(shorter.disks[0].chain) == 3
    assert (await factory.host.backups.verify(folder)).damages == ()


async def _merge_upper_two(services: Services) -> str:
    with (
        patch("atoll.operations.merge.LONGEST", 2),
        patch("atoll.model.chain.LONGEST", 2),
        patch("atoll.model.chain.AFTER", 2),
    ):
        assert await merge(services=services) == 1
    return next(layer.id for layer in services.records.layers() if layer.merged)


@pytest.mark.slow
async def test_a_long_chain_is_restored_flat_and_backed_up_without_copying(
    factory: Factory, elsewhere: Factory, folder: Path
) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    for number in range(9):
        await vm.sh(f"echo {number} > /root/file{number}; sync")
        backup = await vm.backup(folder)
    assert len(backup.disks[0].chain) == 10
    back = elsewhere.machine(await elsewhere.host.backups.restore(folder))  # type: ignore[arg-type]
    assert await disagreements(elsewhere.layout) == []
    assert len(list(elsewhere.layout.layers.iterdir())) == 1
    await back.start(wait=True, timeout=120)
    assert await back.sh("cat /root/file?") == "\n".join("012345678")
    before = layers_in(folder)
    again = await back.backup(folder)
    assert again.disks[0].chain[:10] == backup.disks[0].chain
    assert len(layers_in(folder) - before) == 1


@pytest.mark.slow
async def test_layers_stay_while_they_are_copied_whatever_becomes_of_the_vm(
    factory: Factory, elsewhere: Factory, folder: Path
) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.sh("dd if=/dev/urandom of=/root/big bs=1M count=64 2>/dev/null; sync")
    content = await vm.sh("sha256sum /root/big")
    copying = asyncio.create_task(vm.backup(folder, quiesce=True))
    began = time.monotonic()
    while not list(folder.glob("tmp/*-layer")) and time.monotonic() - began < 60:
        await asyncio.sleep(0.005)
    assert not copying.done()
    await vm.rm(force=True)
    backup = await copying
    assert isinstance(backup, Backup) and backup.quiesced
    assert (await factory.host.backups.verify(folder)).damages == ()
    back = elsewhere.machine(await elsewhere.host.backups.restore(folder))  # type: ignore[arg-type]
    await back.start(wait=True, timeout=120)
    assert await back.sh("sha256sum /root/big") == content


async def test_the_variables_of_uefi_come_back(factory: Factory, folder: Path) -> None:
    vm = factory.machine(await factory.host.create(CreateRequest(name="v", firmware="uefi", disk_size="1MiB")))
    nvram = factory.layout.vm(vm.id).nvram
    nvram.write_bytes(nvram.read_bytes()[:-4] + b"mine")
    backup = await vm.backup(folder)
    assert backup.nvram is not None and backup.disks[0].chain == ()
    await vm.rm()
    back = factory.machine(await factory.host.backups.restore(folder))  # type: ignore[arg-type]
    assert factory.layout.vm(back.id).nvram.read_bytes().endswith(b"mine")
    assert await disagreements(factory.layout) == []
