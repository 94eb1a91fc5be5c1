"""Who uses a VM: a lock that all of them share, in whatever process they are, and that goes with them.

Who suspends a VM since nobody uses it holds the lock alone meanwhile. So nobody's command is cut off by that: it comes
first, or waits and finds the VM asleep. The lock file's time tells when somebody used it last.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator

from atoll.errors import AtollError, Busy
from atoll.host import files
from atoll.layout import Layout
from atoll.operations.services import LOCK_TIMEOUT

_LONGEST_PAUSE = 0.05


class Use:
    """One use, until it is closed."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _note(descriptor)
            os.close(descriptor)


async def begin(layout: Layout, vm_id: str) -> Use:
    """Use a VM from now on. Raises `Busy` when it is being suspended for longer than one waits for a lock."""
    try:
        descriptor = files.open_lock(layout.vm_use(vm_id))
    except AtollError:
        # On a full disk people shall still get in; nobody is suspended there either.
        return Use(None)
    try:
        await _share(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    _note(descriptor)
    return Use(descriptor)


async def _share(descriptor: int) -> None:
    deadline = asyncio.get_running_loop().time() + LOCK_TIMEOUT
    pause = 0.001
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        if asyncio.get_running_loop().time() >= deadline:
            raise Busy("the VM is being suspended", "it takes long", "See `atoll operation ls`.")
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _note(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(descriptor)


@contextlib.asynccontextmanager
async def using(layout: Layout, vm_id: str) -> AsyncIterator[None]:
    """Use a VM within."""
    use = await begin(layout, vm_id)
    try:
        yield
    finally:
        use.close()


@contextlib.contextmanager
def unused(layout: Layout, vm_id: str) -> Iterator[bool]:
    """Keep users away within, if there is none; yields whether that is so."""
    with files.locked(layout.vm_use(vm_id), wait=False) as ours:
        yield ours


def last(layout: Layout, vm_id: str) -> float:
    """When somebody used it last, in seconds since 1970, as far as it is known."""
    try:
        return layout.vm_use(vm_id).stat().st_mtime
    except OSError:
        return 0.0
