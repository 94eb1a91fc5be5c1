"""Making and growing qcow2 heads with qemu-img."""

import errno
import os
from pathlib import Path

from atoll.errors import ProcessFailed, from_os_error
from atoll.host import process
from atoll.host.facts import free_disk

LEAST_ROOM = 4 << 20
"""Bytes that have to be free for a new head. It takes a twentieth of that; the rest is for whoever runs already."""
_REFUSALS = (errno.ENOSPC, errno.EDQUOT)


async def create_head(path: Path, *, size: int, layer: Path | None) -> None:
    """A new writable head of `size` bytes, an overlay on a frozen layer or blank, in place of one that was there.

    Raises `StorageFailed` when the disk is full, `ProcessFailed`.
    """
    if free_disk(path.parent) < LEAST_ROOM:
        raise from_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"make the disk {path}")
    path.unlink(missing_ok=True)
    below = [] if layer is None else ["-b", str(layer), "-F", "qcow2"]
    # -u: the layer is ours and needn't be opened; QEMU gets the chain by node anyway.
    options = ["-f", "qcow2", "-u", "-o", "compat=1.1,lazy_refcounts=off", *below]
    await _qemu_img(["create", "-q", *options, "--", path, str(size)], f"make the disk {path}")


async def resize(path: Path, size: int) -> None:
    """Grow a head that no QEMU has open. `size` is the whole new size in bytes. Raises as `create_head` does."""
    await _qemu_img(["resize", "-q", "-f", "qcow2", "--", path, str(size)], f"grow the disk {path}")


async def _qemu_img(words: list[str | Path], doing: str) -> None:
    try:
        await process.run(["qemu-img", *words], env={"LC_ALL": "C"})
    except ProcessFailed as error:
        for number in _REFUSALS:
            if os.strerror(number) in error.why:
                raise from_os_error(OSError(number, os.strerror(number)), doing) from error
        raise
