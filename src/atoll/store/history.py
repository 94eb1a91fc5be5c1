"""The part of the SQLite records that holds snapshots. Each function is part of the caller's transaction."""

import sqlite3
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from atoll.errors import AlreadyExists
from atoll.model.image import Layer
from atoll.model.snapshot import Snapshot
from atoll.model.vm import Vm

_snapshot = msgspec.json.Decoder(Snapshot)
_layer = msgspec.json.Decoder(Layer)
_vm = msgspec.json.Decoder(Vm)
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
