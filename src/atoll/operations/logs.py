"""What a VM wrote: its serial line, QEMU's own messages, or QEMU's events."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

from atoll.errors import from_os_error
from atoll.host import facts
from atoll.host.watch import follow, wait_for_exit
from atoll.model.vm import Vm
from atoll.operations.services import Services

Source = Literal["serial", "qemu", "events"]
_BLOCK = 64 * 1024


async def read(
    vm: Vm, *, services: Services, follow_it: bool = False, tail: int | None = None, source: Source = "serial"
) -> AsyncIterator[bytes]:
    """The log of the last run, from its last `tail` lines on if given; with `follow_it` until the VM stops."""
    paths = services.layout.vm(vm.id)
    path = {"serial": paths.serial_log, "qemu": paths.qemu_log, "events": paths.event_log}[source]
    offset = 0 if tail is None else _offset_of_tail(path, tail)
    if follow_it and vm.run is not None and facts.is_alive(vm.run):
        gone = asyncio.ensure_future(wait_for_exit(vm.run.pid))
        try:
            async for chunk in follow(path, offset=offset, until=gone):
                yield chunk
        finally:
            gone.cancel()
        return
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_BLOCK):
                yield chunk
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error


def _offset_of_tail(path: Path, lines: int) -> int:
    """Where the last `lines` lines begin; read from the end, since a serial log can be large."""
    if lines <= 0:
        return path.stat().st_size if path.exists() else 0
    try:
        with path.open("rb") as file:
            end = position = file.seek(0, 2)
            found = 0
            while position > 0:
                start = max(0, position - _BLOCK)
                file.seek(start)
                block = file.read(position - start)
                # The newline that ends the log doesn't begin a line.
                skip = 1 if position == end and block.endswith(b"\n") else 0
                for index in range(len(block) - 1 - skip, -1, -1):
                    if block[index] == 0x0A:
                        found += 1
                        if found == lines:
                            return start + index + 1
                position = start
    except FileNotFoundError:
        pass
    return 0
