"""Room kept for the records: with a full disk VMs can still be looked at, stopped and removed, which frees some."""

import contextlib
import os
from pathlib import Path

from atoll.errors import StorageFailed
from atoll.host.facts import free_disk

SIZE = 1 << 20
LOW = 256 << 10
"""Bytes. With less, SQLite may lack room for its log and for the memory that processes share."""
PLENTY = 16 << 20
"""Bytes that are free when the room is taken (again)."""


def keep(path: Path) -> None:
    """Take the room, unless it is taken, or the disk is nearly full. Best effort."""
    with contextlib.suppress(OSError, StorageFailed):
        if path.exists() or free_disk(path.parent) < PLENTY:
            return
        # Random, since some file systems keep zeros in no room at all.
        path.write_bytes(os.urandom(SIZE))


def give_when_low(path: Path) -> None:
    """Give the room up for the transaction to come if there is hardly any other. Best effort."""
    with contextlib.suppress(OSError, StorageFailed):
        if free_disk(path.parent) < LOW:
            path.unlink(missing_ok=True)
