"""What the agent keeps for itself over its own end, in a small SQLite file. Losing it loses no VM and no operation.

So it isn't waited for on the disk, a file that can't be read is begun anew, and where nothing can be written the agent
works on.
"""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from atoll.host import files

_TABLES = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS positions (
        vm_id TEXT PRIMARY KEY,
        run TEXT NOT NULL,
        offset INTEGER NOT NULL,
        event INTEGER NOT NULL
    ) STRICT;
"""


class Position(msgspec.Struct, frozen=True):
    """How far an engine's log of events was read."""

    run: str
    """Of which QEMU."""
    offset: int
    event: int
    """The newest event that was recorded by then."""


class State:
    """The open file."""

    def __init__(self, path: Path) -> None:
        files.make_folder(path.parent)
        try:
            self._db = _opened(path)
        except sqlite3.DatabaseError:
            for each in (path, *(path.with_name(f"{path.name}-{end}") for end in ("wal", "shm"))):
                each.unlink(missing_ok=True)
            self._db = _opened(path)

    def close(self) -> None:
        self._db.close()

    def _write(self, statement: str, *values: object) -> None:
        with contextlib.suppress(sqlite3.DatabaseError):
            self._db.execute(statement, values)

    def _rows(self, query: str, *values: object) -> list[Any]:
        with contextlib.suppress(sqlite3.DatabaseError):
            return self._db.execute(query, values).fetchall()
        return []

    # Engines' logs

    def position(self, vm_id: str) -> Position | None:
        rows = self._rows("SELECT run, offset, event FROM positions WHERE vm_id = ?", vm_id)
        return Position(*rows[0]) if rows else None

    def put_position(self, vm_id: str, position: Position) -> None:
        values = (vm_id, position.run, position.offset, position.event)
        self._write("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?)", *values)

    def forget_position(self, vm_id: str) -> None:
        self._write("DELETE FROM positions WHERE vm_id = ?", vm_id)


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.executescript(_TABLES)
    except BaseException:
        db.close()
        raise
    return db
