"""Waiting for a VM: until it is ready, has stopped, or has said something on its serial line. No polling.

`ready` is the first answer of the guest agent; QEMU's own event log tells when the guest opens the agent's port. A
guest without an agent is ready when it runs.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from atoll.errors import AtollError, InvalidInput, TimedOut, WrongState
from atoll.host.watch import follow, wait_for_exit
from atoll.layout import VmPaths
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import guest_setup, observe
from atoll.operations.services import Services

Condition = Literal["ready", "stopped"]
_KEPT_TEXT = 256 * 1024
"""Characters of serial output that a pattern can span."""


async def wait(
    vm: Vm, condition: Condition | None, *, services: Services, text: str | None = None, timeout: float | None = None
) -> str:
    """Until the condition holds, or the serial line has `text` (a regular expression); returns what was seen.

    Raises `TimedOut` after `timeout` seconds, `WrongState` when the VM ends first.
    """
    wanted = f"'{text}'" if text is not None else condition or "ready"
    try:
        async with asyncio.timeout(timeout):
            if text is not None:
                return await _said(vm, services, _pattern(text))
            if condition == "stopped":
                return await _stopped(vm, services)
            return await _ready(vm, services)
    except TimeoutError:
        paths = services.layout.vm(vm.id)
        last = observe.tail_text(paths.serial_log, 2)
        raise TimedOut(
            f"{vm.name}: it wasn't {wanted} within {timeout:g} s"
            if text is None
            else f"{vm.name}: {wanted} wasn't said within {timeout:g} s",
            f"its serial line ends with: {last}" if last else "its serial line is silent",
            f"See `atoll logs {vm.name}`, `atoll screenshot {vm.name}`, or give it more time with --timeout.",
        ) from None


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidInput(
            f"'{text}' is no regular expression", str(error), "Put \\ before special characters."
        ) from error


async def _stopped(vm: Vm, services: Services) -> str:
    if vm.run is not None:
        await wait_for_exit(vm.run.pid)
    return str(observe.phase_of(services, services.vm(vm.id)))


def _ended(vm: Vm, services: Services) -> WrongState:
    info = observe.observe_one(services, services.vm(vm.id))
    why = f"{info.exit.reason}: {info.exit.detail}" if info.exit else "it is stopped"
    return WrongState(f"{vm.name} ended while it was waited for", why, f"See `atoll logs {vm.name}`.")


def _require_running(vm: Vm, services: Services) -> None:
    if vm.run is None or observe.phase_of(services, vm) is Phase.STOPPED:
        raise WrongState(f"{vm.name}: can't be waited for", "it is stopped", f"Start it with `atoll start {vm.name}`.")


async def _said(vm: Vm, services: Services, pattern: re.Pattern[str]) -> str:
    _require_running(vm, services)
    seen = ""
    async for chunk in _until_exit(vm, services.layout.vm(vm.id).serial_log):
        seen = (seen + chunk.decode(errors="replace"))[-_KEPT_TEXT:]
        match = pattern.search(seen) or pattern.search(observe.ANSI.sub("", seen))
        if match:
            return match[0]
    raise _ended(vm, services)


async def _ready(vm: Vm, services: Services) -> str:
    _require_running(vm, services)
    if not vm.spec.guest.agent:
        return "running"
    paths = services.layout.vm(vm.id)
    async for chunk in _agent_openings(vm, paths):
        if chunk:
            with contextlib.suppress(AtollError):
                await guest_setup.ping(paths, timeout=30)
                await _first_boot_done(vm, services)
                return "ready"
    raise _ended(vm, services)


async def _first_boot_done(vm: Vm, services: Services) -> None:
    """The first time it is ready: a guest that couldn't learn its name at boot learns it now."""
    if vm.seeded:
        return
    spec = vm.spec
    if spec.boot.firmware != "kernel" and not spec.wants_seed:
        with contextlib.suppress(AtollError):
            await guest_setup.set_hostname(services.layout.vm(vm.id), vm.name)
    async with services.lease(vm.id, what=vm.name):
        services.records.put_vm(replace(services.vm(vm.id), seeded=True))


async def _agent_openings(vm: Vm, paths: VmPaths) -> AsyncIterator[bool]:
    """True each time the guest opens its agent's port, false when it closes it."""
    if vm.run is not None and vm.run.from_memory:
        # Its port was open already when its memory was saved, and QEMU doesn't tell that again.
        yield True
    rest = b""
    async for chunk in _until_exit(vm, paths.event_log):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            # On a full disk a line may have lost its end.
            with contextlib.suppress(ValueError, KeyError):
                data = json.loads(line)["data"] if b"VSERPORT_CHANGE" in line else {}
                if data.get("id") == "port-agent":
                    yield bool(data["open"])


async def _until_exit(vm: Vm, path: Path) -> AsyncIterator[bytes]:
    assert vm.run is not None
    gone = asyncio.ensure_future(wait_for_exit(vm.run.pid))
    try:
        async for chunk in follow(path, until=gone):
            yield chunk
    finally:
        gone.cancel()
