"""Run a command by the guest agent alone: for guests without stream ports, and when all of them are in use.

The agent keeps up to 16 MiB of each output and gives them at the end, and nothing tells that the end has come.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from atoll.errors import Busy, GuestFailed, Unsupported
from atoll.layout import VmPaths
from atoll.operations import guest_scripts
from atoll.operations.guest_agent import exchange
from atoll.operations.guest_slot import SH, forget
from atoll.qemu.guest import CAPTURE_LIMIT, Agent, ExecStatus, Refused

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.5
ENDING = 15.0
"""Seconds for a killer to end in the guest; one that has been started goes on without us."""
KILLING = 60.0
"""Seconds for all of it: others may have the guest's agent, or the guest may have much to do."""


async def execute_captured(
    paths: VmPaths,
    name: str,
    command: list[str],
    *,
    cwd: str | None,
    stdin: bytes | AsyncIterator[bytes] | None,
    out: Callable[[bytes], object],
    err: Callable[[bytes], object],
) -> int:
    """Run a command to its end and give its exit code. Raises `GuestFailed`, also when output was lost."""
    given = await _whole(name, stdin)
    pid = 0
    try:
        async with exchange(paths, name) as agent:
            pid = await _start(agent, command, cwd=cwd, stdin=given)
        status = await collected(paths, name, pid)
    except GuestFailed:
        raise
    except BaseException:
        await to_its_end(kill_tree(paths, name, pid))
        raise
    out(status.stdout)
    err(status.stderr)
    if status.truncated:
        raise GuestFailed(
            f"{name}: the command wrote more than {CAPTURE_LIMIT >> 20} MiB",
            "the guest agent dropped the rest; there was no free stream port in this guest",
            "Let it write to a file, and copy that with `atoll cp`.",
        )
    return status.code


async def to_its_end(doing: Coroutine[Any, Any, None]) -> None:
    """Kill what nobody waits for: somebody who is cancelled again, as clients are that go in several ways at once, does
    it all the same. Time ends it. That it fails is no news.
    """
    work = asyncio.ensure_future(asyncio.wait_for(doing, KILLING))
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([work])
    with contextlib.suppress(GuestFailed, Busy, TimeoutError):
        work.result()


async def _whole(name: str, stdin: bytes | AsyncIterator[bytes] | None) -> bytes | None:
    if stdin is None or isinstance(stdin, bytes):
        whole = stdin
    else:
        gathered = bytearray()
        async for data in stdin:
            gathered += data
            if len(gathered) > CAPTURE_LIMIT:
                break
        whole = bytes(gathered)
    if whole is not None and len(whole) > CAPTURE_LIMIT:
        raise Unsupported(
            f"{name}: standard input is longer than {CAPTURE_LIMIT >> 20} MiB",
            "there was no free stream port in this guest",
            "Copy it with `atoll cp` first.",
        )
    return whole


async def _start(agent: Agent, command: list[str], *, cwd: str | None, stdin: bytes | None) -> int:
    try:
        words = ["-c", guest_scripts.RUN_CAPTURED, "sh", cwd or "", *command]
        return await agent.start(SH, words, stdin=stdin, capture=True)
    except Refused:
        if cwd:
            raise
        return await agent.start(command[0], command[1:], stdin=stdin, capture=True)


async def collected(paths: VmPaths, name: str, pid: int) -> ExecStatus:
    """The end of a process that the agent started, asked for again and again. Raises `GuestFailed`."""
    pause = FIRST_PAUSE
    while True:
        async with exchange(paths, name) as agent:
            status = await agent.status(pid)
        if status.exited:
            return status
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE)


async def kill_tree(paths: VmPaths, name: str, pid: int, *, folder: str = "") -> None:
    """Kill a process that the agent started, all its descendants, and all that write to the relays in `folder`.

    The guest's agent is free for others while the killer is at work: so many may be killed at once.
    """
    async with exchange(paths, name, timeout=ENDING) as agent:
        killer = await agent.start(SH, ["-c", guest_scripts.KILL, "sh", str(pid or "-"), folder])
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ENDING):
            await collected(paths, name, killer)
            if pid:
                async with exchange(paths, name) as agent:
                    await forget(agent, pid)
