"""What QEMU reports of running VMs becomes events of ours.

QEMU writes its events to a log of its own (docs/decisions/001). The agent reads on where it, or the agent before it,
has stopped reading, so none is told twice and none that came between two agents is lost.
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from asyncinotify import Watch

from atoll.agent.state import Position, State
from atoll.host.watch import Watches
from atoll.model.vm import Run, Vm
from atoll.operations.services import Services

_KINDS = {
    "STOP": "vm.halted",
    "RESUME": "vm.continued",
    "RESET": "vm.reset",
    "SHUTDOWN": "vm.shutdown",
    "GUEST_PANICKED": "vm.panicked",
    "WATCHDOG": "vm.watchdog",
    "BLOCK_IO_ERROR": "vm.io-error",
}
_KEPT = ("guest", "reason", "action", "operation", "device", "node-name")
KINDS = frozenset({*_KINDS.values(), "vm.disk-full"})
_PIECE = 256 * 1024
BURST, PER_SECOND = 50.0, 2.0
"""A guest can reset itself without end. What it tells beyond this is left out, so that others' events stay."""


def translated(message: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Our event for one of QEMU's: its kind and what it tells. None for one that isn't told."""
    kind = _KINDS.get(message.get("event", ""))
    if kind is None:
        return None
    said = message.get("data", {})
    if said.get("nospace"):
        kind = "vm.disk-full"
    stamp = message["timestamp"]
    told = {name: said[name] for name in _KEPT if said.get(name) not in (None, "")}
    return kind, {"at": stamp["seconds"] + stamp["microseconds"] / 1e6, **told}


class _Log:
    """One QEMU's log, open: it stays the same file when the next start puts it aside."""

    def __init__(self, vm: Vm, run: str, descriptor: int, watch: Watch) -> None:
        self.vm = vm
        self.run = run
        self.descriptor = descriptor
        self.watch = watch
        self.offset = 0
        self.known: set[tuple[str, float]] = set()
        """Events that an agent has recorded after it noted its position for the last time."""
        self.allowance, self.allowed_at, self.left_out = BURST, time.monotonic(), 0

    def allows(self) -> bool:
        now = time.monotonic()
        self.allowance = min(BURST, self.allowance + (now - self.allowed_at) * PER_SECOND)
        self.allowed_at = now
        if self.allowance < 1:
            self.left_out += 1
            return False
        self.allowance -= 1
        return True


class EngineLogs:
    """The logs of all running VMs."""

    def __init__(self, services: Services, state: State) -> None:
        self._services = services
        self._state = state
        self._watches = Watches()
        self._logs: dict[str, _Log] = {}

    def close(self) -> None:
        for vm_id in list(self._logs):
            self._close(vm_id)
        self._watches.close()

    def _close(self, vm_id: str) -> None:
        log = self._logs.pop(vm_id)
        self._watches.remove(log.watch)
        os.close(log.descriptor)

    def begin(self, everyone: Sequence[Vm]) -> None:
        """Read on in the logs of all that run, or have been running when the agent before this one ended."""
        self._state.forget_positions_but({vm.id for vm in everyone})
        for vm in everyone:
            self.follow(vm)

    def follow(self, vm: Vm) -> None:
        """Read on in the log of a VM that runs; the whole of one that nobody has read."""
        if vm.run is None:
            return
        run = _name_of(vm.run)
        if vm.id in self._logs and self._logs[vm.id].run == run:
            return
        self.drop(vm.id)
        path = self._services.layout.vm(vm.id).event_log
        try:
            watch = self._watches.add(path, vm.id)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        log = self._logs[vm.id] = _Log(vm, run, descriptor, watch)
        noted = self._state.position(vm.id)
        if noted is not None and noted.run == run:
            log.offset = noted.offset
            log.known = self._recorded(vm.id, after=noted.event)
        else:
            self._note(log)
        self._read(log)

    def _recorded(self, vm_id: str, *, after: int) -> set[tuple[str, float]]:
        found = set()
        while events := self._services.records.events(after=after):
            after = events[-1].id
            found |= {(each.kind, each.data["at"]) for each in events if each.vm_id == vm_id and each.kind in KINDS}
        return found

    def drop(self, vm_id: str) -> None:
        """Read what its QEMU has said last."""
        if (log := self._logs.get(vm_id)) is not None:
            self._read(log)
            self._close(vm_id)

    def forget(self, vm_id: str) -> None:
        """A VM that was removed."""
        self.drop(vm_id)
        self._state.forget_position(vm_id)

    async def read(self) -> None:
        """Record what comes, as it comes, until cancelled."""
        async for changed in self._watches.changes():
            for vm_id in changed:
                if (log := self._logs.get(vm_id)) is not None:
                    self._read(log)

    def _read(self, log: _Log) -> None:
        recorded = False
        while piece := os.pread(log.descriptor, _PIECE, log.offset):
            whole = piece[: piece.rfind(b"\n") + 1]
            if not whole:
                break
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    recorded |= self._record(log, json.loads(line))
            log.offset += len(whole)
        if recorded:
            self._note(log)

    def _record(self, log: _Log, message: dict[str, Any]) -> bool:
        found = translated(message)
        if found is None or (found[0], found[1]["at"]) in log.known or not log.allows():
            return False
        kind, data = found
        if log.left_out:
            data["left_out"], log.left_out = log.left_out, 0
        # QEMU has it in its log; waiting for the disk takes longer than an event may.
        self._services.records.add_event(kind, vm_id=log.vm.id, name=log.vm.name, data=data, durable=False)
        return True

    def _note(self, log: _Log) -> None:
        position = Position(run=log.run, offset=log.offset, event=self._services.records.last_event())
        self._state.put_position(log.vm.id, position)


def _name_of(run: Run) -> str:
    return f"{run.boot_id}:{run.pid}:{run.start_time}"
