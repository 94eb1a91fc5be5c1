"""The part of the SQLite records that holds snapshots. Each function is part of the caller's transaction."""

import sqlite3
from collections.abc import Iterable
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from atoll.errors import AlreadyExists
from atoll.model.image import Image, ImageDisk, Layer
from atoll.model.snapshot import Snapshot
from atoll.model.spec import DiskSpec, VmSpec
from atoll.model.vm import Vm

_snapshot = msgspec.json.Decoder(Snapshot)
_layer = msgspec.json.Decoder(Layer)
_vm = msgspec.json.Decoder(Vm)
_image = msgspec.json.Decoder(Image)
_layer = msgspec.json.Decoder(Layer)
Disk = TypeVar("Disk", DiskSpec, ImageDisk)
_encode = msgspec.json.Encoder().encode


def read(rows: Iterable[tuple[bytes]]) -> list[Snapshot]:
    """Raises `msgspec.DecodeError` for a damaged one."""
    return [_snapshot.decode(record) for (record,) in rows]


def put_layers(db: sqlite3.Connection, layers: Iterable[Layer]) -> None:
    rows = [(layer.id, _encode(layer)) for layer in layers]
    db.executemany("INSERT OR REPLACE INTO layers VALUES (?, ?)", rows)


def note_sha256(db: sqlite3.Connection, layer_id: str, sha256: str) -> None:
    row = db.execute("SELECT record FROM layers WHERE id = ?", (layer_id,)).fetchone()
    if row is not None:
        put_layers(db, [replace(_layer.decode(row[0]), sha256=sha256)])


def put(db: sqlite3.Connection, snapshot: Snapshot) -> None:
    """Add or replace. Raises `AlreadyExists` when another snapshot of the VM has its name."""
    taken = db.execute(
        "SELECT id FROM snapshots WHERE vm_id = ? AND name = ? AND id != ?",
        (snapshot.vm_id, snapshot.name, snapshot.id),
    ).fetchone()
    if taken:
        raise AlreadyExists(
            f"{snapshot.vm_name} has a snapshot '{snapshot.name}' already",
            next_step=f"Choose another name, or `atoll forget {snapshot.vm_name} {snapshot.name}` first.",
        )
    row = (snapshot.id, snapshot.vm_id, snapshot.name, snapshot.created_at, _encode(snapshot))
    db.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?)", row)


def remove(db: sqlite3.Connection, snapshot_id: str) -> None:
    """Its children, snapshots and heads, get its parent."""
    found = read(db.execute("SELECT record FROM snapshots WHERE id = ?", (snapshot_id,)))
    if not found:
        return
    parent = found[0].parent
    for snapshot in read(db.execute("SELECT record FROM snapshots").fetchall()):
        if snapshot.parent == snapshot_id:
            put(db, replace(snapshot, parent=parent))
    for (record,) in db.execute("SELECT record FROM vms").fetchall():
        vm = _vm.decode(record)
        if vm.snapshot == snapshot_id:
            db.execute("UPDATE vms SET record = ? WHERE id = ?", (_encode(replace(vm, snapshot=parent)), vm.id))
    db.execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))


def put_in_place(db: sqlite3.Connection, layer: Layer, *, of: str) -> None:
    """Everything that stands on the layer `of` stands on `layer`, which has the same content."""

    def moved(disks: tuple[Disk, ...]) -> tuple[Disk, ...]:
        return tuple(replace(disk, layer=layer.id) if disk.layer == of else disk for disk in disks)

    def moved_spec(spec: VmSpec) -> VmSpec:
        return replace(spec, disks=moved(spec.disks))

    above = [_layer.decode(record) for (record,) in db.execute("SELECT record FROM layers").fetchall()]
    put_layers(db, [layer, *(replace(each, parent=layer.id) for each in above if each.parent == of)])
    for (record,) in db.execute("SELECT record FROM vms").fetchall():
        vm = _vm.decode(record)
        pending = None if vm.pending is None else moved_spec(vm.pending)
        if (now := replace(vm, spec=moved_spec(vm.spec), pending=pending)) != vm:
            db.execute("UPDATE vms SET record = ? WHERE id = ?", (_encode(now), vm.id))
    for snapshot in read(db.execute("SELECT record FROM snapshots").fetchall()):
        if (kept := replace(snapshot, spec=moved_spec(snapshot.spec))) != snapshot:
            put(db, kept)
    for (record,) in db.execute("SELECT record FROM images").fetchall():
        image = _image.decode(record)
        if (named := replace(image, disks=moved(image.disks))) != image:
            db.execute("UPDATE images SET record = ? WHERE id = ?", (_encode(named), image.id))
