"""SQLite's errors as the user should read them."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from atoll.errors import RecordsFailed
from atoll.host.facts import free_disk
from atoll.store.reserve import LOW

_UNWRITABLE = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")


def can_only_be_read(error: RecordsFailed) -> bool:
    """Whether a database may be sound though it couldn't be opened: the disk is full, or this user may not write."""
    return getattr(error.__cause__, "sqlite_errorname", "").startswith(_UNWRITABLE)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Around whatever touches the database at `path`. Raises `RecordsFailed`; clashes of unique values pass through."""
    try:
        yield
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordsFailed(
            f"a record in {path} can't be read",
            str(error),
            "It may be of a newer Atoll: upgrade, or restore a backup of that file.",
        ) from error
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        why, next_step = _explained(path, error)
        raise RecordsFailed(f"the records in {path} can't be used", why, next_step) from error


def _explained(path: Path, error: sqlite3.DatabaseError) -> tuple[str, str]:
    """Why, and what to do next."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and free_disk(path.parent) < LOW):
        return "the disk is full", "Free some space (`atoll prune`), then try again."
    if os.path.isdir(path):  # noqa: PTH112  # unlike `Path.is_dir`, it doesn't raise where we may not look
        return "it is a folder", "Move it away, or set ATOLL_HOME."
    if name.startswith("SQLITE_IOERR"):
        return f"the disk can't be read or written ({error})", "See `dmesg`, then try again."
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return f"it can't be written ({error})", "Check that folder's owner and mode, or set ATOLL_HOME."
    if name.startswith("SQLITE_BUSY"):
        return "another process kept it locked", "Try again; `atoll operation ls` shows what runs."
    recover = f"Recover it with `sqlite3 {path} .recover`, or move it away: disks and images stay on disk."
    return f"it is damaged ({error})", recover
