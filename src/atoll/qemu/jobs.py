"""What QEMU works on for a while: migration streams to and from files. Their events become `Progress`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from atoll.errors import EngineFailed, StorageFailed, TimedOut
from atoll.model.operation import Progress
from atoll.qemu.monitor import Events, Monitor

Report = Callable[[Progress], None]

LIVE_MEMORY = ("background-snapshot", "mapped-ram")
"""Memory as it is when tracking starts, while the guest runs on: pages are written before they change."""
WHOLE_MEMORY = ("mapped-ram",)
"""Memory of a guest that stands still. Each page has its own place in the file, so the file is as large as the RAM."""
REPORT_TIME = 0.5
"""Seconds between two looks at how far a stream is."""
_FINALIZE_TIME = 30.0
_ENDED = {"completed": "", "failed": "it failed", "cancelled": "it was cancelled"}


async def supports_live_memory(monitor: Monitor) -> bool:
    """Whether this host and this guest's RAM allow `LIVE_MEMORY`; it needs the kernel's userfaultfd for writes."""
    try:
        await _switch(monitor, LIVE_MEMORY, on=True)
    except EngineFailed:
        return False
    await _switch(monitor, LIVE_MEMORY, on=False)
    return True


@contextlib.asynccontextmanager
async def capabilities(monitor: Monitor, names: Iterable[str]) -> AsyncIterator[None]:
    """Have migration capabilities on inside, and off again afterwards: the next stream may not have them."""
    wanted = tuple(names)
    await _switch(monitor, wanted, on=True)
    try:
        yield
    finally:
        with contextlib.suppress(EngineFailed, TimedOut):
            await _switch(monitor, wanted, on=False)


async def switch_on(monitor: Monitor, names: Iterable[str]) -> None:
    """Have migration capabilities on beyond this connection; `switch_off` comes when the stream has ended."""
    await _switch(monitor, names, on=True)


async def switch_off(monitor: Monitor) -> None:
    """All that is switched on here, off. Raises `EngineFailed` while a stream is under way."""
    await _switch(monitor, LIVE_MEMORY, on=False)


async def supports_mapped(monitor: Monitor) -> bool:
    """Whether this QEMU gives each page a place of its own in a stream."""
    return "mapped-ram" in await known(monitor)


async def known(monitor: Monitor) -> set[str]:
    """The migration capabilities that this QEMU has; before 9.0 there is no `mapped-ram`, and streams are plain."""
    return {each["capability"] for each in await monitor.execute("query-migrate-capabilities")}


async def _switch(monitor: Monitor, names: Iterable[str], *, on: bool) -> None:
    there = await known(monitor)
    wanted = [name for name in (*names, *(["events"] if on else [])) if name in there]
    states = [{"capability": name, "state": on} for name in wanted]
    await monitor.execute("migrate-set-capabilities", {"capabilities": states})


async def until_tracked(monitor: Monitor) -> None:
    """Until writes to memory are tracked: from then on the guest may run without the stream seeing what it does.

    QEMU tells of no such moment (its state says `active` before it). The first page is written just after it.
    """
    while True:
        status: dict[str, Any] = await monitor.execute("query-migrate")
        _raise_if_failed(status)
        ram = status.get("ram", {})
        if ram.get("normal", 0) + ram.get("duplicate", 0) > 0 or status.get("status") == "completed":
            return


@contextlib.asynccontextmanager
async def migration_events(monitor: Monitor) -> AsyncIterator[Events]:
    """Subscribe before the stream begins."""
    async with monitor.events(["MIGRATION"]) as events:
        yield events


async def until_ended(monitor: Monitor, events: Events, *, report: Report, step: str) -> None:
    """Until the stream is complete. Raises `EngineFailed` with QEMU's reason, `StorageFailed` for a full disk."""
    while True:
        status: dict[str, Any] = await monitor.execute("query-migrate")
        _raise_if_failed(status)
        if status.get("status") == "completed":
            return
        ram = status.get("ram")
        if ram:
            report(Progress(step=step, done=ram["total"] - ram["remaining"], total=ram["total"], unit="bytes"))
        with contextlib.suppress(TimedOut):
            await events.next(timeout=REPORT_TIME)


async def until_finalized(monitor: Monitor) -> None:
    """Until QEMU lets a guest go on that stood still for a stream; that is a moment after it tells of the end."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FINALIZE_TIME):
            while True:
                state: dict[str, Any] = await monitor.execute("query-status")
                if state["status"] != "finish-migrate":
                    return
                await asyncio.sleep(0.005)


def _raise_if_failed(status: dict[str, Any]) -> None:
    why = _ENDED.get(status.get("status", ""))
    if not why:
        return
    said = status.get("error-desc", why)
    if "No space left" in said:
        raise StorageFailed("the memory can't be saved", said, "Free some space (`atoll prune`), then try again.")
    raise EngineFailed("the memory can't be saved or loaded", said)


async def cancel(monitor: Monitor) -> None:
    """End a stream that is under way; nothing happens when there is none."""
    status: dict[str, Any] = await monitor.execute("query-migrate")
    if status.get("status") in (None, "none", *_ENDED):
        return
    async with migration_events(monitor) as events:
        await monitor.execute("migrate_cancel")
        with contextlib.suppress(EngineFailed):
            async with asyncio.timeout(30):
                await until_ended(monitor, events, report=lambda progress: None, step="")
