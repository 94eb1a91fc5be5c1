"""A look at the whole database that no damaged record stops, for `fsck`."""

import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from atoll.model.image import Image, Layer
from atoll.model.names import SHORT_ID
from atoll.model.operation import Operation
from atoll.model.snapshot import Snapshot
from atoll.model.vm import Vm
from atoll.store.records import Flaw, Readable, Unreadable

T = TypeVar("T", Vm, Snapshot, Image, Layer, Operation)
MOST_FLAWS = 20
_UNFINISHED = ("running", "undoing", "stuck")
# Rows that name things of a record that is gone: they only keep a port or a name taken.
_DANGLING = {
    "ports": "vm_id NOT IN (SELECT id FROM vms)",
    "nics": "vm_id NOT IN (SELECT id FROM vms)",
    "image_names": "image_id NOT IN (SELECT id FROM images)",
}


def readable(db: sqlite3.Connection) -> Readable:
    """Everything of one instant. Raises `sqlite3.DatabaseError`."""
    unreadable: list[Unreadable] = []
    db.execute("BEGIN")
    try:
        vms = _decoded(db, "SELECT id, name, record FROM vms ORDER BY created_at, id", Vm, "VM", unreadable)
        snapshots = _decoded(
            db, "SELECT id, name, record FROM snapshots ORDER BY created_at, id", Snapshot, "snapshot", unreadable
        )
        images = _decoded(db, "SELECT id, '', record FROM images ORDER BY created_at, id", Image, "image", unreadable)
        layers = _decoded(db, "SELECT id, '', record FROM layers ORDER BY id", Layer, "layer", unreadable)
        operations = _decoded(db, "SELECT id, '', record FROM operations", Operation, "operation", unreadable)
        ids = frozenset(row[0] for row in db.execute("SELECT id FROM vms"))
        unreadable += _unreadable_events(db)
    finally:
        db.execute("ROLLBACK")
    unfinished = [operation for operation in operations if operation.state in _UNFINISHED]
    return Readable(
        vms=vms,
        snapshots=snapshots,
        images=images,
        layers=layers,
        unfinished=unfinished,
        unreadable=unreadable,
        vm_ids=ids,
    )


def _decoded(db: sqlite3.Connection, query: str, kind: type[T], called: str, unreadable: list[Unreadable]) -> list[T]:
    """The records of a table; those that can't be decoded are added to `unreadable`."""
    decoder = msgspec.json.Decoder(kind)
    found: list[T] = []
    for row_id, name, record in db.execute(query).fetchall():
        why = _why_not(decoder.decode, record)
        if why is None:
            found.append(decoder.decode(record))
            if found[-1].id == row_id:
                continue
            why = f"it says that it is {found[-1].id[:SHORT_ID]}"
        unreadable.append(Unreadable(thing=f"{called} {name or row_id[:SHORT_ID]}", why=why))
    return found


def _why_not(decode: Callable[[Any], object], record: Any) -> str | None:
    try:
        decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as error:
        return str(error)
    return None


def _unreadable_events(db: sqlite3.Connection) -> list[Unreadable]:
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    found = [(number, _why_not(decode, data)) for number, data in db.execute("SELECT id, data FROM events")]
    return [Unreadable(thing=f"event {number}", why=why) for number, why in found if why is not None]


def flaws(db: sqlite3.Connection, *, quick: bool) -> list[Flaw]:
    """What SQLite finds. Raises `sqlite3.DatabaseError` where it can't even look."""
    pragma = "quick_check" if quick else "integrity_check"
    told = [str(row[0]) for row in db.execute(f"PRAGMA {pragma}({MOST_FLAWS})")]
    found = [Flaw(why=why, repair="make the indexes anew" if "index" in why else "") for why in told if why != "ok"]
    for table, where in _DANGLING.items():
        (count,) = db.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()
        if count:
            why = f"{count} rows in '{table}' belong to nothing that is recorded"
            found.append(Flaw(why=why, repair="remove them: they only keep ports and names taken", harmless=True))
    return found


def mend(db: sqlite3.Connection) -> None:
    """Part of the caller's transaction. An index has nothing that isn't in its table too."""
    db.execute("REINDEX")
    for table, where in _DANGLING.items():
        db.execute(f"DELETE FROM {table} WHERE {where}")
