"""`fsck` finds each kind of damage, says whom it concerns, mends what can be mended, and leaves the rest alone."""

import asyncio
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from tests.helpers.command import atoll
from tests.helpers.machines import Factory, Machine
from tests.helpers.world import disagreements

from atoll.layout import Layout
from atoll.model.finding import Finding
from atoll.model.names import new_id
from atoll.model.operation import Operation, Progress
from atoll.model.requests import DiskRequest
from atoll.operations.journal import this_process

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


async def found(factory: Factory, *, repair: bool = False, quick: bool = False) -> list[Finding]:
    return await factory.host.fsck(repair=repair, quick=quick)


async def only(factory: Factory, kind: str, *, repair: bool = False, quick: bool = False) -> Finding:
    """The one finding, of this kind."""
    (finding,) = await found(factory, repair=repair, quick=quick)
    assert finding.kind == kind, finding
    return finding


async def kept(factory: Factory) -> tuple[Machine, Path]:
    """A stopped VM with a snapshot, and the layer that is that snapshot's own."""
    vm = await factory.create("tiny", name="v", memory="96MiB")
    node = await vm.snapshot("first")
    return vm, factory.layout.layer(node.layer_ids[0])


def head(factory: Factory, vm: Machine) -> Path:
    return factory.layout.vm(vm.id).head(vm.record.spec.disks[0])


def damage(path: Path, change: Callable[[bytearray], object]) -> bytes:
    """Put a changed copy in the file's place (the file itself may be shared with other tests); what it has then."""
    content, mode = bytearray(path.read_bytes()), path.stat().st_mode & 0o777
    change(content)
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)
    return bytes(content)


def sql(layout: Layout, *statements: str) -> None:
    database = sqlite3.connect(layout.database)
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()


async def test_a_healthy_home_where_all_is_used_has_no_findings(factory: Factory) -> None:
    await factory.image("tiny")
    assert await found(factory) == []
    vm = await factory.run("tiny", name="v", memory="96MiB", disks=(DiskRequest(name="data", size="8MiB"),))
    await vm.snapshot("with-memory")
    await vm.snapshot("disks", disk_only=True)
    await vm.fork(2)
    await vm.clone("clone")
    await factory.host.clone("v@disks", "whole", full=True)
    asleep = await factory.run("tiny", name="asleep", memory="96MiB")
    await asleep.suspend()
    stopped = await factory.run("tiny", name="stopped", memory="96MiB")
    await stopped.disk_resize("root", "2GiB")
    await stopped.stop()
    await stopped.snapshot("grown")
    await vm.forget("disks")
    told: list[Progress] = []
    assert await factory.host.fsck(report=told.append) == []
    assert {"records", "files", "read what is frozen", "disks of stopped VMs"} <= {each.step for each in told}
    assert all(layer.sha256 for layer in factory.host._services.records.layers())
    assert await found(factory, repair=True) == []
    assert await disagreements(factory.layout) == []


async def stopped_life(factory: Factory, name: str) -> None:
    vm = await factory.create("tiny", name=name, memory="96MiB")
    await vm.snapshot("first")
    await vm.clone(f"{name}-clone")
    await vm.restore("first")
    await vm.forget("first")
    await vm.rm()
    await (await factory.host.get(f"{name}-clone")).rm()


async def running_life(factory: Factory, name: str) -> None:
    vm = await factory.run("tiny", name=name, memory="96MiB")
    await vm.snapshot("first")
    forks = await vm.fork(2)
    await vm.suspend()
    await vm.resume()
    await vm.restore("first")
    await vm.disk_add(DiskRequest(name="more", size="8MiB"))
    for each in (*forks, vm):
        await each.rm(force=True)


@pytest.mark.slow
@pytest.mark.parametrize("life", [stopped_life, running_life])
async def test_a_busy_home_raises_no_alarm(
    life: Callable[[Factory, str], Coroutine[None, None, None]], factory: Factory
) -> None:
    await factory.image("tiny")
    stop = asyncio.Event()
    told: list[str] = []

    async def work(number: int) -> None:
        while not stop.is_set():
            await life(factory, f"v{number}")

    async def look_from_outside() -> None:
        while not stop.is_set():
            ended = await asyncio.to_thread(atoll, "fsck", "--repair")
            told.append(f"{ended.out}{ended.err}")
            await asyncio.to_thread(atoll, "prune")

    workers = [asyncio.create_task(work(number)) for number in range(2)] + [asyncio.create_task(look_from_outside())]
    looks = 0
    deadline = time.monotonic() + 15
    try:
        while time.monotonic() < deadline and not any(worker.done() for worker in workers):
            looks += 1
            assert await found(factory, quick=looks % 4 != 0, repair=looks % 2 == 0) == []
            await asyncio.sleep(0.02)
    finally:
        stop.set()
        await asyncio.gather(*workers)
    assert looks >= 4 and set(told) == {"Nothing is wrong.\n"}
    assert await found(factory) == []
    assert await disagreements(factory.layout) == []


async def test_a_layer_that_is_gone_is_told_with_whoever_needs_it(factory: Factory) -> None:
    vm, layer = await kept(factory)
    aside = layer.with_name("aside")
    shutil.move(layer, factory.folder / "aside")
    finding = await only(factory, "layer-missing")
    assert finding.severity == "error" and not finding.repair
    assert finding.affected == ("VM v", "snapshot v@first")
    assert str(layer) in finding.next_step and "`atoll forget v first`" in finding.next_step
    assert await only(factory, "layer-missing", repair=True, quick=True) == finding
    refused = await asyncio.to_thread(atoll, "start", "v")
    assert refused.code == 1 and "atoll fsck" in refused.err
    shutil.move(factory.folder / "aside", layer)
    assert not aside.exists() and await found(factory) == []
    assert vm.record.spec.disks[0].layer == layer.stem


def cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def empty(content: bytearray) -> None:
    content.clear()


def other(content: bytearray) -> None:
    content[:4] = b"DISK"


def first_table(content: bytearray) -> None:
    """An entry of the L1 table that points far behind the end."""
    offset = int.from_bytes(content[40:48], "big")
    content[offset : offset + 8] = (0x8000_0000_0000_0000 | 1 << 40).to_bytes(8, "big")


@pytest.mark.parametrize("change", [cut, empty, other, first_table])
@pytest.mark.parametrize("whose", ["image", "snapshot"])
async def test_a_damaged_layer_is_told_and_never_written(
    change: Callable[[bytearray], None], whose: str, factory: Factory
) -> None:
    _, layer = await kept(factory)
    if whose == "image":
        (image,) = await factory.host.images.ls()
        layer = factory.layout.layer(image.layer_ids[0])
    left, before = damage(layer, change), layer.stat()
    finding = await only(factory, "layer-damaged", repair=True)
    assert finding.severity == "error" and not finding.repaired
    assert "VM v" in finding.affected and "snapshot v@first" in finding.affected
    assert ("image tiny:latest" in finding.affected) == (whose == "image")
    after = layer.stat()
    assert layer.read_bytes() == left
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_ino) == (
        before.st_mtime_ns,
        before.st_ctime_ns,
        before.st_ino,
    )


async def test_bits_that_rotted_are_found_once_the_content_is_known(factory: Factory) -> None:
    _, layer = await kept(factory)
    (image,) = await factory.host.images.ls()
    assert await found(factory) == []
    for path in (layer, factory.layout.layer(image.layer_ids[0])):
        whole = path.read_bytes()

        def flip(content: bytearray) -> None:
            content[-1] ^= 1

        damage(path, flip)
        finding = await only(factory, "layer-damaged")
        assert "content has changed" in finding.detail
        assert await found(factory, quick=True) == []
        damage(path, lambda content, whole=whole: content.__setitem__(slice(None), whole))
    assert await found(factory) == []


async def test_a_file_that_is_damaged_or_gone_is_told(factory: Factory) -> None:
    vm, _ = await kept(factory)
    blob = factory.layout.blob(vm.record.spec.boot.kernel or "")
    whole = blob.read_bytes()
    damage(blob, lambda content: content.append(0))
    finding = await only(factory, "blob-damaged", repair=True)
    assert set(finding.affected) == {"VM v", "snapshot v@first", "image tiny:latest"}
    assert await found(factory, quick=True) == []
    blob.unlink()
    assert (await only(factory, "blob-missing", repair=True)).affected == finding.affected
    blob.write_bytes(whole)
    finding = await only(factory, "mode")
    assert finding.severity == "warning" and finding.repair
    assert (await only(factory, "mode", repair=True)).repaired
    assert await found(factory) == []


async def test_modes_are_mended(factory: Factory) -> None:
    _, layer = await kept(factory)
    layer.chmod(0o644)
    before = hashlib.sha256(layer.read_bytes()).hexdigest()
    finding = await only(factory, "mode")
    assert "0644" in finding.detail and not finding.repaired and layer.stat().st_mode & 0o777 == 0o644
    assert (await only(factory, "mode", repair=True)).repaired
    assert layer.stat().st_mode & 0o777 == 0o444
    assert hashlib.sha256(layer.read_bytes()).hexdigest() == before
    assert await found(factory) == []


async def test_records_of_layers_that_are_lost_or_go_in_a_circle(factory: Factory) -> None:
    vm, layer = await kept(factory)
    second = (await vm.snapshot("second")).layer_ids[0]
    change = "UPDATE layers SET record = CAST(json_set(CAST(record AS TEXT), '$.parent', '{}') AS BLOB) WHERE id = '{}'"
    sql(factory.layout, change.format(second, layer.stem))
    findings = await found(factory)
    assert [finding.kind for finding in findings] == ["layer-circle", "layer-circle"]
    assert await factory.host.prune(dry_run=True) == [], "looking for what isn't needed ends too"
    sql(factory.layout, f"DELETE FROM layers WHERE id = '{layer.stem}'")
    finding = await only(factory, "layer-unrecorded", repair=True)
    assert set(finding.affected) == {"VM v", "snapshot v@first", "snapshot v@second"}
    # What is below it isn't known any more, so no layer may be removed.
    await factory.host.images.rm("tiny", force=True)
    before = sorted(factory.layout.layers.iterdir())
    await factory.host.prune(every=True)
    assert sorted(factory.layout.layers.iterdir()) == before


async def test_heads_that_are_lost_or_damaged_are_told(factory: Factory) -> None:
    vm, _ = await kept(factory)
    path = head(factory, vm)
    path.write_bytes(b"no disk")
    finding = await only(factory, "head-damaged", repair=True)
    assert finding.affected == ("VM v",) and "atoll history v" in finding.next_step
    path.unlink()
    finding = await only(factory, "head-missing", repair=True)
    assert finding.thing == "VM v, disk 'root'" and finding.severity == "error"
    await vm.restore("first")
    assert await found(factory) == []
    damage(head(factory, vm), first_table)
    assert "qemu-img" in (await only(factory, "head-damaged")).detail


@pytest.mark.slow
async def test_leaked_clusters_of_a_stopped_vm_are_given_back(factory: Factory) -> None:
    vm, _ = await kept(factory)
    path = head(factory, vm)

    def leak(content: bytearray) -> None:
        # Count a cluster behind all others as used: refcount table, its first block, 16 bits for each cluster.
        table = int.from_bytes(content[48:56], "big")
        block = int.from_bytes(content[table : table + 8], "big")
        used = -(-len(content) // 65536)
        content.extend(bytes(65536))
        content[block + 2 * used : block + 2 * used + 2] = (1).to_bytes(2, "big")

    damage(path, leak)
    finding = await only(factory, "leaks")
    assert (finding.severity, finding.repaired) == ("note", False)
    assert await found(factory, quick=True) == []
    await vm.start(wait=True, timeout=120)
    assert await found(factory, repair=True) == [], "the disks of running VMs are left alone"
    await vm.stop(force=True)
    assert (await only(factory, "leaks", repair=True)).repaired
    assert await found(factory) == []
    await vm.start(wait=True, timeout=120)


async def test_memory_that_is_lost_or_damaged_is_told_with_a_way_out(factory: Factory) -> None:
    vm = await factory.run("tiny", name="v", memory="96MiB")
    await vm.snapshot("first")
    await vm.suspend()
    assert await found(factory) == []
    suspended = vm.record.suspended
    assert suspended is not None
    (of_snapshot,) = [path for path in factory.layout.memory.iterdir() if path.name != suspended.id]
    whole = of_snapshot.read_bytes()
    damage(of_snapshot, cut)
    finding = await only(factory, "memory-damaged", quick=True)
    assert finding.affected == ("snapshot v@first",) and "atoll clone" in finding.next_step
    damage(of_snapshot, lambda content: content.__setitem__(slice(None), whole))
    factory.layout.memory_file(suspended.id).unlink()
    finding = await only(factory, "memory-missing", quick=True)
    assert finding.affected == ("VM v",) and "`atoll stop --force v`" in finding.next_step
    await vm.stop(force=True)
    assert await found(factory, quick=True) == []


async def test_what_nothing_needs_is_told_and_removed(factory: Factory) -> None:
    await kept(factory)
    layout = factory.layout
    layout.temporary.mkdir(exist_ok=True)
    stray = [layout.layers / f"{new_id()}.qcow2", layout.blobs / ("0" * 64), layout.temporary / "half-done"]
    for path in stray:
        path.write_bytes(b"x" * 5000)
    (layout.vms / new_id()).mkdir()
    lonely = layout.vms / new_id()
    lonely.mkdir()
    (lonely / "root.qcow2").write_bytes(b"x")
    findings = await found(factory)
    assert {(each.kind, each.severity) for each in findings} == {("unneeded", "note"), ("folder", "note")}
    assert len(findings) == 5 and all(path.exists() for path in stray)
    mended = await found(factory, repair=True)
    assert sorted(each.kind for each in mended if each.repaired) == ["folder", "unneeded", "unneeded", "unneeded"]
    assert not any(path.exists() for path in stray)
    assert [each.thing for each in await found(factory)] == [f"folder {lonely.name[:12]}"]
    assert (lonely / "root.qcow2").exists()


async def test_operations_and_snapshots_that_were_left(factory: Factory) -> None:
    vm, _ = await kept(factory)
    operation = Operation(
        id=new_id(), verb="start", subject=vm.id, subject_name="v", request={"vm_id": vm.id}, state="running",
        owner=this_process(), created_at=time.time(),
    )  # fmt: skip
    records = factory.host._services.records
    records.put_operation(operation)
    assert await found(factory) == [], "it goes on"
    records.put_operation(Operation(**{**_fields(operation), "state": "stuck", "error": "the disk is full"}))
    finding = await only(factory, "operation", repair=True)
    assert finding.severity == "warning" and f"atoll operation retry {operation.id[:12]}" in finding.next_step
    records.put_operation(Operation(**{**_fields(operation), "state": "done"}))
    sql(factory.layout, f"UPDATE snapshots SET vm_id = '{new_id()}', record = CAST(replace(CAST(record AS TEXT),"
        f" '\"vm_id\":\"{vm.id}\"', '\"vm_id\":\"{new_id()}\"') AS BLOB)")  # fmt: skip
    finding = await only(factory, "snapshot-alone")
    assert finding.severity == "warning" and "atoll clone" in finding.next_step


def _fields(operation: Operation) -> dict[str, object]:
    return {name: getattr(operation, name) for name in operation.__struct_fields__}


async def test_records_that_cannot_be_read_do_not_hide_the_rest(factory: Factory) -> None:
    _, layer = await kept(factory)
    await factory.create("tiny", name="other", memory="96MiB")
    layer.chmod(0o600)
    stray = factory.layout.layers / f"{new_id()}.qcow2"
    stray.write_bytes(b"x")
    sql(factory.layout, "UPDATE vms SET record = CAST('{\"id\": 5}' AS BLOB) WHERE name = 'other'")
    told = await asyncio.to_thread(atoll, "fsck", "--quick", "--format", "json")
    assert (told.code, told.err) == (1, "")
    findings = json.loads(told.out)
    assert [(each["kind"], each["thing"]) for each in findings] == [
        ("record-damaged", "VM other"),
        ("mode", f"layer {layer.stem[:12]}"),
    ]
    await found(factory, repair=True)
    assert stray.exists(), "nobody knows whether the VM that can't be read needs it"
    sql(factory.layout, "DELETE FROM vms WHERE name = 'other'")


async def test_indexes_and_rows_of_the_database_are_mended(factory: Factory) -> None:
    await kept(factory)
    sql(
        factory.layout,
        "PRAGMA foreign_keys = OFF",
        "INSERT INTO ports VALUES ('gone', '127.0.0.1', 8080, 'tcp')",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = 'CREATE INDEX ports_by_vm ON ports(host_port)' WHERE name = 'ports_by_vm'",
    )
    findings = await found(factory)
    assert findings and {each.kind for each in findings} == {"records"}
    assert all(each.repair for each in findings)
    mended = await found(factory, repair=True)
    assert mended and all(each.repaired for each in mended)
    assert await found(factory) == []


async def test_the_command_line(factory: Factory) -> None:
    _, layer = await kept(factory)
    healthy = await asyncio.to_thread(atoll, "fsck")
    assert healthy == (0, "Nothing is wrong.\n", "")
    layer.chmod(0o644)
    told = await asyncio.to_thread(atoll, "fsck", "--quick")
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith(f"warn  layer {layer.stem[:12]}: ") and told.out.endswith("\n1 warning.\n")
    assert "`--repair` can: give it the mode 0444." in told.out
    mended = await asyncio.to_thread(atoll, "fsck", "--repair")
    assert mended.code == 0 and "Mended: give it the mode 0444." in mended.out and "1 mended." in mended.out
    layer.unlink()
    lost = await asyncio.to_thread(atoll, "fsck", "--repair")
    assert lost.code == 1 and lost.out.startswith("ERROR layer ") and "Needed by: VM v, snapshot v@first" in lost.out
    listed = json.loads((await asyncio.to_thread(atoll, "fsck", "--format", "json")).out)
    assert listed[0]["kind"] == "layer-missing" and listed[0]["affected"] == ["VM v", "snapshot v@first"]
    factory.layout.database.write_bytes(b"no database at all" * 100)
    for path in factory.layout.data.glob("atoll.db-*"):
        path.unlink()
    broken = await asyncio.to_thread(atoll, "fsck")
    assert broken.code == 1 and broken.out.startswith("ERROR records: "), broken
    assert broken.err == ""


async def test_uefi_variables_that_are_lost_are_given_anew(factory: Factory) -> None:
    vm = factory.machine(await factory.host.create(None, name="u", firmware="uefi", disk_size="8MiB", memory="96MiB"))  # type: ignore[arg-type]
    nvram = factory.layout.vm(vm.id).nvram
    fresh = nvram.read_bytes()
    nvram.unlink()
    assert (await only(factory, "nvram-missing")).severity == "error"
    assert (await only(factory, "nvram-missing", repair=True)).repaired
    assert nvram.read_bytes() == fresh and os.access(nvram, os.W_OK)
    assert await found(factory) == []
