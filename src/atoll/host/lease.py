"""The per-VM lock: who holds it drives the VM. It goes with its process (`flock`): a killed tool holds nothing."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

from atoll.errors import Busy
from atoll.host.files import open_lock


@contextlib.asynccontextmanager
async def lease(path: Path, *, what: str, timeout: float) -> AsyncIterator[None]:
    """Hold the lock at `path`. Raises `StorageFailed`, or `Busy` when another process or task has kept it for `timeout`
    seconds.

    A lock has no event to wait for without a thread that can't be cancelled, hence the growing pauses.
    """
    descriptor = open_lock(path)
    try:
        deadline = asyncio.get_running_loop().time() + timeout
        pause = 0.002
        while not _try_lock(descriptor):
            if asyncio.get_running_loop().time() >= deadline:
                raise Busy(
                    f"{what} is busy",
                    f"another operation has worked on it for over {timeout:g} s",
                    "See `atoll operation ls`; `atoll operation cancel` ends one.",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
