"""The content of some layers, put together in a new file, by QEMU's storage daemon: its block-stream job."""

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.errors import EngineFailed, TimedOut, from_os_error
from atoll.host import disks, process
from atoll.model.operation import Progress
from atoll.operations.services import Report
from atoll.qemu.monitor import Monitor

LOOK_AGAIN = 0.5
"""Seconds between two looks at how far it is; the job has an event for its end only."""
JOB = "merge"


async def merge_content(chain: Sequence[Path], target: Path, *, count: int, report: Report) -> None:
    """Fill `target`, an empty overlay, with what the last `count` files of the chain have. These aren't written.

    Raises `EngineFailed`, `StorageFailed` when the disk is full.
    """
    ours, theirs = socket.socketpair()
    argv = ["qemu-storage-daemon", "--chardev", f"socket,id=qmp,fd={theirs.fileno()}", "--monitor", "chardev=qmp"]
    daemon = asyncio.ensure_future(process.run(argv, pass_fds=(theirs.fileno(),)))
    # One that can't begin, or ends early, is noticed by its end of the socket.
    daemon.add_done_callback(lambda _: theirs.close())
    try:
        async with Monitor(ours, timeout=30) as monitor:
            # It has its own copy of the socket by now.
            theirs.close()
            await _stream(monitor, chain, target, count, report)
            await monitor.execute("quit")
        await daemon
    except EngineFailed:
        if daemon.done() and not daemon.cancelled() and (why := daemon.exception()) is not None:
            raise why from None
        raise
    except OSError as error:
        raise from_os_error(error, f"merge into {target}") from error
    finally:
        theirs.close()
        daemon.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await daemon


async def _stream(monitor: Monitor, chain: Sequence[Path], target: Path, count: int, report: Report) -> None:
    below: str | None = None
    for number, path in enumerate(chain):
        below = await _add(monitor, f"n{number}", path, below, read_only=True)
    top = await _add(monitor, "top", target, below, read_only=False)
    base = len(chain) - count - 1
    stays = {"base-node": f"n{base}", "backing-file": str(chain[base])} if base >= 0 else {}
    async with monitor.events(["JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR"]) as events:
        await monitor.execute("block-stream", {"job-id": JOB, "device": top, "auto-dismiss": False} | stays)
        while True:
            job = next(each for each in await monitor.execute("query-jobs") if each["id"] == JOB)
            if job["status"] == "concluded":
                break
            done, total = job["current-progress"], job["total-progress"]
            report(Progress(step="merge layers", done=done, total=total or None, unit="bytes"))
            with contextlib.suppress(TimedOut):
                await events.next(timeout=LOOK_AGAIN)
    if "error" in job:
        if (refusal := disks.no_room(job["error"])) is not None:
            raise from_os_error(refusal, f"merge layers into {target}")
        raise EngineFailed("the layers can't be merged", job["error"])
    await monitor.execute("job-dismiss", {"id": JOB})


async def _add(monitor: Monitor, name: str, path: Path, below: str | None, *, read_only: bool) -> str:
    file = {"driver": "file", "filename": str(path), "read-only": read_only, "discard": "unmap"}
    node: dict[str, Any] = {"driver": "qcow2", "node-name": name, "file": file, "backing": below}
    await monitor.execute("blockdev-add", node | {"read-only": read_only})
    return name
