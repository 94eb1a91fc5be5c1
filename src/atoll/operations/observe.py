"""A VM's phase, observed: from its process and from QMP, never from a lock or a flag. Synchronous, and quick for many.

The end of a run is read from the log of events that QEMU itself wrote (see `qemu/plan.py`), since nobody of ours is
there to see it.
"""

import contextlib
import json
import re
import select
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from atoll.errors import RecordsFailed, StorageFailed
from atoll.host import facts
from atoll.host.sockets import connect
from atoll.layout import VmPaths
from atoll.model.state import Phase, Trouble, phase_of_run_state, trouble_of_run_state
from atoll.model.vm import Exit, Vm, VmInfo
from atoll.operations.services import Services

Answer = TypeVar("Answer")
ANSWER_TIME = 1.0
"""Seconds that all VMs together have to answer; one that doesn't is `unknown`."""
SILENT_TIME = 0.2
"""The same in a list, for those that didn't answer this process before: an agent has others to answer meanwhile."""
_QUESTION = b'{"execute":"qmp_capabilities"}\n{"execute":"query-status","id":"status"}\n'
_LOG_TAIL = 64 * 1024
LAST_LINES = 5
"""Lines of the guest's that are kept with its end."""
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Escape sequences, with which firmware and boot loaders paint between the letters of a word."""


def list_vms(services: Services) -> list[VmInfo]:
    """All VMs with their phases, oldest first; ends that are noticed are recorded."""
    working = {operation.subject: operation.verb for operation in services.records.operations(unfinished=True)}
    return observe(services, services.records.vms(), working)


def observe_one(services: Services, vm: Vm) -> VmInfo:
    """One VM with its phase. It has its whole time to answer: more than a line in a list depends on it."""
    services.silent.discard(vm.id)
    return observe(services, [vm], {})[0]


def place_of(services: Services, vm: Vm) -> str | None:
    """The snapshot that the VM stands on: its name, `VM@NAME` for another VM's; None for none, or a forgotten one."""
    node = services.records.snapshot(vm.snapshot) if vm.snapshot is not None else None
    if node is None or node.vm_id == vm.id:
        return node.name if node is not None else None
    owner = services.records.vm(node.vm_id)
    return f"{owner.name if owner is not None else node.vm_name}@{node.name}"


def phase_of(services: Services, vm: Vm) -> Phase:
    return observe_one(services, vm).phase


def observe(services: Services, vms: Iterable[Vm], working: dict[str, str]) -> list[VmInfo]:
    """Ask all running ones at once, then put the answers together."""
    everyone = list(vms)
    alive = [vm for vm in everyone if vm.run is not None and facts.is_alive(vm.run)]
    answers = _ask(alive, services)
    found = []
    for vm in everyone:
        if vm.run is not None and vm.id not in answers:
            vm = record_end(services, vm)
        no_process = Phase.SUSPENDED if vm.suspended is not None else Phase.STOPPED
        phase, trouble = answers.get(vm.id, (no_process, None))
        ended = vm.last_exit if phase is Phase.STOPPED else None
        found.append(VmInfo(vm=vm, phase=phase, operation=working.get(vm.id), exit=ended, trouble=trouble))
    return found


async def aside(ask: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    """Ask QEMUs by their `observe` monitors, in a thread with a loop of its own.

    Such a monitor serves one client at a time, and who looks at a phase stands still until it is his turn. If the one
    before him were a task of the same loop, that would never end its conversation, and he would take QEMU for silent.
    """
    import asyncio

    from atoll.images.source import in_thread

    return await in_thread(lambda _: asyncio.run(ask()))


def _ask(vms: list[Vm], services: Services) -> dict[str, tuple[Phase, Trouble | None]]:
    answers: dict[str, tuple[Phase, Trouble | None]] = {vm.id: (Phase.UNKNOWN, None) for vm in vms}
    poll = select.poll()
    asked: dict[int, tuple[socket.socket, str, bytearray]] = {}
    try:
        for vm in vms:
            with contextlib.suppress(OSError):
                client = connect(services.layout.vm(vm.id).socket("observe"))
                asked[client.fileno()] = (client, vm.id, bytearray())
                client.send(_QUESTION)
                poll.register(client, select.POLLIN)
        waiting = set(asked)
        begun = time.monotonic()
        known = {descriptor for descriptor, (_, vm_id, _) in asked.items() if vm_id in services.silent}
        while waiting and (left := begun + (ANSWER_TIME if waiting - known else SILENT_TIME) - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                client, vm_id, received = asked[descriptor]
                more = b""
                with contextlib.suppress(OSError):
                    more = client.recv(65536)
                received += more
                run_state = _answered(bytes(received))
                if run_state is not None or not more:
                    answers[vm_id] = phase_of_run_state(run_state or ""), trouble_of_run_state(run_state or "")
                    waiting.discard(descriptor)
                    poll.unregister(descriptor)
        services.silent -= answers.keys()
        services.silent |= {asked[descriptor][1] for descriptor in waiting}
    finally:
        for client, _, _ in asked.values():
            client.close()
    return answers


def _answered(received: bytes) -> str | None:
    """QEMU's run state, once it has been told."""
    for line in received.splitlines(keepends=True):
        if line.endswith(b"\n") and b'"status"' in line:
            message = json.loads(line)
            if message.get("id") == "status":
                return str(message["return"]["status"])
    return None


def record_end(services: Services, vm: Vm) -> Vm:
    """Write down that the process is gone and why, unless an operation holds the VM and will do it itself.

    Where nothing can be written, the next command will see the same.
    """
    from atoll.host import cgroups
    from atoll.host.files import locked

    end = evidence(vm, services.layout.vm(vm.id))
    ended = replace(vm, run=None, last_exit=end)
    with (
        contextlib.suppress(StorageFailed, RecordsFailed),
        locked(services.layout.vm_lock(vm.id), wait=False) as ours,
    ):
        current = services.records.vm(vm.id) if ours else None
        if current is not None and current.run == vm.run:
            ended = replace(current, run=None, last_exit=end)
            services.records.put_vm(ended)
            cgroups.remove(vm.id)
            services.bridges_left |= _bridges(services, vm)
            _unpublish(services, ended)
            data = {"reason": end.reason, "detail": end.detail}
            services.records.add_event("vm.ended", vm_id=vm.id, name=vm.name, data=data)
    return ended


def _bridges(services: Services, vm: Vm) -> set[str]:
    networks = [services.records.network(nic.network) for nic in vm.spec.nics if nic.network]
    return {network.id for network in networks if network is not None and network.mode == "bridge"}


def _unpublish(services: Services, vm: Vm) -> None:
    """Ports on shared networks are their uplinks', which go on."""
    for nic in vm.spec.nics:
        if nic.network and nic.address and nic.ports:
            from atoll.host import slirp

            with contextlib.suppress(OSError):
                for port in nic.ports:
                    slirp.remove(services.layout.network(nic.network).uplink, nic.address, port)


def evidence(vm: Vm, paths: VmPaths) -> Exit:
    """How the last run ended, from the log of events, QEMU's own words, and the host's boot; and the guest's words."""
    lines = [line.rstrip() for line in _tail(paths.serial_log).splitlines() if line.strip()]
    end = _end_of_run(vm, paths)
    first = -LAST_LINES
    if end.reason == "guest-panic":
        # Linux tells why first, and then a page of registers.
        first = next((number for number, line in enumerate(lines) if "Kernel panic" in line), first)
    return replace(end, last_lines="\n".join(lines[first:][:LAST_LINES]))


def _end_of_run(vm: Vm, paths: VmPaths) -> Exit:
    assert vm.run is not None
    shutdown: dict[str, Any] | None = None
    panicked = False
    for event in events_of_last_run(paths):
        if event.get("event") == "SHUTDOWN":
            shutdown = event
        panicked = panicked or event.get("event") == "GUEST_PANICKED"
    if shutdown is not None:
        at = shutdown["timestamp"]["seconds"] + shutdown["timestamp"]["microseconds"] / 1e6
        reason = shutdown.get("data", {}).get("reason", "")
        if reason == "guest-panic" or panicked:
            return Exit(at=at, reason="guest-panic", detail="the guest's kernel panicked")
        if shutdown.get("data", {}).get("guest"):
            return Exit(at=at, reason="guest-shutdown", detail="the guest powered itself off")
        if reason == "host-signal":
            return Exit(at=at, reason="killed", detail=last_words(paths) or "a signal ended QEMU")
        return Exit(at=at, reason="stopped", detail=reason)
    if vm.run.boot_id != facts.boot_id():
        return Exit(at=vm.run.started_at, reason="host-rebooted", detail="the host was restarted while it ran")
    words = last_words(paths)
    if words:
        return Exit(at=time.time(), reason="crashed", detail=words)
    return Exit(at=time.time(), reason="killed", detail="QEMU vanished without a word: SIGKILL, or out of memory")


def events_of_last_run(paths: VmPaths) -> list[dict[str, Any]]:
    """What QEMU wrote since its last greeting, oldest first (only the end of a long log)."""
    try:
        with paths.event_log.open("rb") as file:
            file.seek(max(0, paths.event_log.stat().st_size - _LOG_TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if "QMP" in message:
                found = []
            elif "event" in message:
                found.append(message)
    return found


def last_words(paths: VmPaths, lines: int = 3) -> str:
    """The end of what QEMU wrote to standard error."""
    return tail_text(paths.qemu_log, lines)


def tail_text(path: Path, lines: int) -> str:
    """The last lines of a log, joined by `; `, fit for a terminal; empty when there is none."""
    return "; ".join(line.strip() for line in _tail(path).splitlines()[-lines:] if line.strip())


def _tail(path: Path) -> str:
    """The last 4 KiB, without escape sequences: what a guest wrote mustn't steer the reader's terminal."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return ANSI.sub("", file.read().decode(errors="replace")).replace("\0", "")
    except OSError:
        return ""
