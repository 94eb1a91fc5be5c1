"""What the agent keeps for itself over its own end, in a small SQLite file. Losing it loses no VM and no operation.

So it isn't waited for on the disk, a file that can't be read is begun anew, and where nothing can be written the agent
works on.
"""

import contextlib
import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from atoll.host import files
from atoll.model.task import Task

LARGEST_TASK = 4 << 20
"""Bytes of an answer that is kept."""
_TABLES = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS positions (
        vm_id TEXT PRIMARY KEY,
        run TEXT NOT NULL,
        offset INTEGER NOT NULL,
        event INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS tasks (
        id TEXT PRIMARY KEY,
        principal TEXT NOT NULL,
        key TEXT,
        digest TEXT NOT NULL,
        created_at REAL NOT NULL,
        record BLOB NOT NULL,
        UNIQUE (principal, key)
    ) STRICT;
    CREATE INDEX IF NOT EXISTS tasks_by_time ON tasks(created_at);
"""


class Position(msgspec.Struct, frozen=True):
    """How far an engine's log of events was read."""

    run: str
    """Of which QEMU."""
    offset: int
    event: int
    """The newest event that was recorded by then."""


class KeptTask(msgspec.Struct, frozen=True):
    """A request as the last agent that had it knew it."""

    principal: str
    key: str | None
    digest: str
    task: Task


class State:
    """The open file."""

    def __init__(self, path: Path) -> None:
        files.make_folder(path.parent)
        try:
            self._db = _opened(path)
        except sqlite3.OperationalError:
            # The disk is full, say: nothing is wrong with what is there.
            self._db = _opened(":memory:")
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

    def forget_positions_but(self, vm_ids: Collection[str]) -> None:
        """Those of VMs that are gone."""
        for (vm_id,) in self._rows("SELECT vm_id FROM positions"):
            if vm_id not in vm_ids:
                self.forget_position(vm_id)

    # Requests

    def put_task(self, kept: KeptTask) -> None:
        """Add or replace. One whose answer is too large to be kept stays as it was."""
        record = msgspec.json.encode(kept.task)
        if len(record) > LARGEST_TASK:
            return
        values = (kept.task.id, kept.principal, kept.key, kept.digest, kept.task.created_at, record)
        self._write("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?)", *values)

    def task(self, task_id: str) -> KeptTask | None:
        return self._task("id = ?", task_id)

    def task_of_key(self, principal: str, key: str) -> KeptTask | None:
        return self._task("principal = ? AND key = ?", principal, key)

    def _task(self, which: str, *values: str) -> KeptTask | None:
        rows = self._rows(f"SELECT principal, key, digest, record FROM tasks WHERE {which}", *values)
        with contextlib.suppress(msgspec.DecodeError):
            for owner, key, digest, record in rows:
                task = msgspec.json.decode(record, type=Task)
                if task.state == "done":
                    task = replace(task, result=msgspec.Raw(msgspec.json.encode(task.result)))
                return KeptTask(owner, key, digest, task)
        return None

    def forget_tasks(self, *, before: float) -> None:
        self._write("DELETE FROM tasks WHERE created_at < ?", before)


def _opened(path: Path | str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.executescript(_TABLES)
    except BaseException:
        db.close()
        raise
    return db
