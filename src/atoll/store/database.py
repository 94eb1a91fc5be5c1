"""The SQLite file under the records: opened, brought to the newest schema, and written in whole transactions."""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atoll.errors import RecordsFailed, from_os_error
from atoll.store.failures import can_only_be_read, told
from atoll.store.reserve import give_when_low, keep
from atoll.store.schema import MIGRATIONS

WAIT_FOR_WRITERS = 60.0
"""Seconds that a transaction waits for those of other processes."""


class Database:
    """One connection. On a full disk, or where this user can't write, it may be one that only reads."""

    def __init__(self, path: Path, *, reserve: Path | None) -> None:
        """Open the file, making or upgrading it. Raises `RecordsFailed` or `StorageFailed`."""
        self._path = path
        self._reserve = reserve
        self._why_not_written: RecordsFailed | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise from_os_error(error, f"make the folder {path.parent}") from error
        if reserve is not None:
            give_when_low(reserve)
        try:
            self._open(path.absolute().as_uri(), self._migrate)
        except RecordsFailed as error:
            if not can_only_be_read(error) or not self._is_whole():
                raise
            self._open_to_read(error)
            return
        if reserve is not None:
            keep(reserve)

    def _open(self, address: str, prepare: Callable[[], None]) -> None:
        with told(self._path):
            self.connection = sqlite3.connect(
                address, uri=True, timeout=WAIT_FOR_WRITERS, isolation_level=None, check_same_thread=False
            )
            try:
                self.connection.execute("PRAGMA foreign_keys = ON")
                self.connection.execute("PRAGMA synchronous = FULL")
                prepare()
            except BaseException:
                self.connection.close()
                raise

    def _is_whole(self) -> bool:
        """Whether all that was recorded is in the file itself, and nothing in the log beside it."""
        log = self._path.with_name(f"{self._path.name}-wal")
        try:
            return self._path.stat().st_size > 0 and (not log.exists() or log.stat().st_size == 0)
        except OSError:
            return False

    def _open_to_read(self, why_not_more: RecordsFailed) -> None:
        """SQLite's way to read where not even its lock files can be made: the file is taken for one that nobody writes.

        Raises `why_not_more` if the file can't be read either, or is an older Atoll's.
        """

        def check() -> None:
            if self._version() != len(MIGRATIONS):
                raise why_not_more

        self._why_not_written = why_not_more
        try:
            self._open(f"{self._path.absolute().as_uri()}?immutable=1", check)
        except RecordsFailed:
            raise why_not_more from None

    def _migrate(self) -> None:
        if self._version() == len(MIGRATIONS):
            return
        with self._alone(), self.transaction() as db:
            version = self._version()
            for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
                for statement in script.split(";"):
                    if statement.strip():
                        db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time makes or upgrades the file: SQLite doesn't wait for others to change its mode."""
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            # Setting the mode writes, so it comes after the first look; a second one sees what others did meanwhile.
            self.connection.execute("PRAGMA journal_mode = WAL")
            yield
        finally:
            os.close(folder)

    def _version(self) -> int:
        """The number of the database's schema. Raises `RecordsFailed` for one that only a newer Atoll knows."""
        version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise RecordsFailed(
                f"{self._path} is of a newer Atoll",
                f"its schema is number {version}, this Atoll knows up to {len(MIGRATIONS)}",
                "Upgrade with `pip install --upgrade atoll`.",
            )
        return version

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All that is written in it holds, or nothing. Raises `RecordsFailed`; clashes of unique values pass.

        What isn't `durable` is there whatever becomes of this process, but a power cut may take the last of it, up to
        what was durable: the file system isn't waited for (SQLite's `PRAGMA synchronous`, with a write-ahead log).
        """
        if self._why_not_written is not None:
            raise self._why_not_written
        if self._reserve is not None:
            give_when_low(self._reserve)
        with told(self._path):
            self.connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                # After some errors, a full disk for one, SQLite has rolled back already.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[Any]:
        with told(self._path):
            return self.connection.execute(query, values).fetchall()
