"""What Prometheus is told: of each VM, of this computer, and of the agent itself.

VMs are read from /proc, in a thread; no guest and no agent in one is asked. What can't be read is left away.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from atoll import __version__
from atoll.agent.exposition import Family, Histogram
from atoll.errors import AtollError, Cancelled
from atoll.host import facts, host_bridge, page_merging
from atoll.host import network as world
from atoll.model.state import Phase
from atoll.model.vm import VmInfo
from atoll.operations import networks
from atoll.operations.services import Services


class Meter:
    """What the agent measures of its own work."""

    def __init__(self) -> None:
        self.requests = Histogram("atoll_request_seconds", "Until an answer began, by call and status.")
        self.calls = Histogram("atoll_operation_seconds", "What changed something, by call and outcome.")

    @contextlib.contextmanager
    def measuring(self, call: str) -> Iterator[None]:
        """The time of what is done within, as one call."""
        begun, outcome = time.monotonic(), "failed"
        try:
            yield
            outcome = "done"
        except (Cancelled, asyncio.CancelledError):
            outcome = "cancelled"
            raise
        finally:
            self.calls.observe(time.monotonic() - begun, call=call, outcome=outcome)


class Measured:
    """The application, with the time of each request."""

    def __init__(self, app: Any, meter: Meter) -> None:
        self._app = app
        self._meter = meter

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun = time.monotonic()

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                handler = scope.get("route_handler")
                call = getattr(handler, "operation_id", None) if handler is not None else None
                told = call if isinstance(call, str) else "none"
                self._meter.requests.observe(time.monotonic() - begun, call=told, status=str(message["status"]))
            await send(message)

        await self._app(scope, receive, sending)


class Reading(Struct, frozen=True):
    """What /proc says of one VM's process."""

    cpu_seconds: float
    resident: int
    memory: dict[str, int]
    """`Shared` and `Private`; empty when it may not be read."""
    merged: int
    io: dict[str, int]


def read(pid: int) -> Reading:
    rollup = _fields(f"{facts.PROC}/{pid}/smaps_rollup")
    memory = {
        kind: 1024 * sum(value for name, value in rollup.items() if name.startswith(f"{kind}_"))
        for kind in ("Shared", "Private")
        if rollup
    }
    return Reading(
        cpu_seconds=facts.cpu_seconds(pid),
        resident=facts.memory_resident(pid),
        memory=memory,
        merged=page_merging.merged_of(pid),
        io=_fields(f"{facts.PROC}/{pid}/io"),
    )


def _fields(path: str) -> dict[str, int]:
    """`Name:   123 kB` of each line. Without a Path: there may be hundreds of VMs."""
    found = {}
    with contextlib.suppress(OSError), open(path, "rb") as file:  # noqa: PTH123
        for line in file.read().decode(errors="replace").splitlines():
            name, separator, value = line.partition(":")
            words = value.split()
            if separator and words and words[0].isdecimal():
                found[name] = int(words[0])
    return found


async def scrape(vms: list[VmInfo], services: Services, meter: Meter, *, tasks: int) -> str:
    """The whole text."""
    pids = {each.vm.id: each.vm.run.pid for each in vms if each.vm.run is not None and each.phase is not Phase.STOPPED}
    readings, own = await asyncio.to_thread(_read_all, pids, os.getpid())
    families = [
        *_of_vms(vms, readings),
        *_of_pressure(vms, services),
        await _of_cards(vms, services),
        *_of_host(vms, services),
        *_of_agent(own, tasks),
    ]
    lines = [line for family in families for line in family.lines()]
    return "\n".join([*lines, *meter.requests.lines(), *meter.calls.lines(), ""])


def _read_all(pids: dict[str, int], own: int) -> tuple[dict[str, Reading], Reading]:
    return {vm_id: read(pid) for vm_id, pid in pids.items()}, read(own)


def _of_vms(vms: list[VmInfo], readings: dict[str, Reading]) -> list[Family]:
    phase = Family("atoll_vm_phase", "gauge", "1 for the phase that the VM is in.")
    cpu = Family("atoll_vm_cpu_seconds_total", "counter", "Processor time, of the host's.")
    given = Family("atoll_vm_memory_given_bytes", "gauge", "What the guest has as its memory.")
    resident = Family("atoll_vm_memory_resident_bytes", "gauge", "What is in the host's memory.")
    shared = Family("atoll_vm_memory_shared_bytes", "gauge", "Of that, what others use as well.")
    private = Family("atoll_vm_memory_private_bytes", "gauge", "Of that, what is its own.")
    merged = Family("atoll_vm_memory_merged_bytes", "gauge", "What is merged with equal pages, of its own or others'.")
    disk = Family("atoll_vm_disk_bytes_total", "counter", "Read from and written to the host's disks.")
    for each in vms:
        labels = {"vm": each.vm.name, "id": each.vm.id}
        phase.add(1, **labels, phase=each.phase.value)
        if (reading := readings.get(each.vm.id)) is None:
            continue
        given.add(each.vm.spec.memory, **labels)
        cpu.add(reading.cpu_seconds, **labels)
        resident.add(reading.resident, **labels)
        merged.add(reading.merged, **labels)
        if reading.memory:
            shared.add(reading.memory["Shared"], **labels)
            private.add(reading.memory["Private"], **labels)
        if reading.io:
            disk.add(reading.io["read_bytes"], **labels, direction="read")
            disk.add(reading.io["write_bytes"], **labels, direction="written")
    return [phase, cpu, given, resident, shared, private, merged, disk]


def _of_pressure(vms: list[VmInfo], services: Services) -> list[Family]:
    """What the watch over the memory knows; guests are asked while somebody reads this, the first reader has none."""
    balloon = Family("atoll_vm_memory_balloon_bytes", "gauge", "What the balloon holds back of what it was given.")
    used = Family("atoll_vm_memory_guest_used_bytes", "gauge", "What the guest needs of it, as its kernel says.")
    reserve = Family("atoll_host_memory_reserve_bytes", "gauge", "What is kept available for the host.")
    low = Family("atoll_host_memory_low", "gauge", "1 while less than that is available.")
    if (watch := services.pressure) is None:
        return []
    for each in vms:
        labels = {"vm": each.vm.name, "id": each.vm.id}
        if each.vm.run is not None:
            balloon.add(watch.held.get(each.vm.id, 0), **labels)
        if each.vm.id in watch.used:
            used.add(watch.used[each.vm.id], **labels)
    reserve.add(watch.reserve)
    low.add(int(watch.low))
    return [balloon, used, reserve, low]


async def _of_cards(vms: list[VmInfo], services: Services) -> Family:
    """Of cards on networks that VMs share; a network of a VM's own counts nothing."""
    family = Family("atoll_vm_network_bytes_total", "counter", "What passed through a card, as the guest sees it.")
    running = [each.vm for each in vms if each.phase is Phase.RUNNING]
    wanted = sorted({network for vm in running for network in networks.shared_by(vm.spec)})
    counted: dict[str, Any] = {}
    for network in wanted:
        with contextlib.suppress(AtollError):
            here = await world.counters(services.layout.network(network))
            counted |= here or await host_bridge.counters(network)
    for vm in running:
        for nic in vm.spec.nics:
            if (told := counted.get(nic.mac)) is not None:
                labels = {"vm": vm.name, "id": vm.id, "nic": nic.name}
                family.add(told.received[0], **labels, direction="received")
                family.add(told.sent[0], **labels, direction="sent")
    return family


def _of_host(vms: list[VmInfo], services: Services) -> list[Family]:
    by_phase = Family("atoll_host_vms", "gauge", "VMs by phase.")
    for phase in Phase:
        by_phase.add(sum(each.phase is phase for each in vms), phase=phase.value)
    asleep = Family("atoll_host_vms_asleep", "gauge", "VMs that sleep until somebody wants them, by what sent them.")
    asleep_memory = Family("atoll_host_memory_asleep_bytes", "gauge", "Their memory, which is on the disk meanwhile.")
    for reason in ("idle", "memory"):
        sleeping = [each.vm for each in vms if each.vm.sleeps and each.vm.suspended_because == reason]
        asleep.add(len(sleeping), reason=reason)
        asleep_memory.add(sum(vm.suspended.file_size for vm in sleeping if vm.suspended is not None), reason=reason)
    promised = Family("atoll_host_memory_promised_bytes", "gauge", "Given to all VMs that have a process.")
    promised.add(sum(each.vm.spec.memory for each in vms if each.vm.run is not None))
    memory = facts.memory()
    total = Family("atoll_host_memory_bytes", "gauge", "The host's memory.")
    total.add(memory.total)
    available = Family("atoll_host_memory_available_bytes", "gauge", "What could still be used of it.")
    available.add(memory.available)
    kernel = page_merging.merged()
    merging = Family("atoll_host_memory_merge_enabled", "gauge", "1 while the kernel merges equal pages.")
    merging.add(int(kernel.on))
    saved = Family("atoll_host_memory_merge_saved_bytes", "gauge", "What is free because equal pages were merged.")
    saved.add(kernel.saved)
    cpu = Family("atoll_host_cpu_seconds_total", "counter", "Processor time of all that runs on the host.")
    ticks = os.sysconf("SC_CLK_TCK")
    with open(facts.PROC / "stat") as file:  # noqa: PTH123
        spent = [int(word) for word in file.readline().split()[1:]]
    for mode, value in zip(
        ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"), spent, strict=False
    ):
        cpu.add(value / ticks, mode=mode)
    free = Family("atoll_host_disk_free_bytes", "gauge", "What can still be written where the VMs are.")
    free.add(facts.free_disk(services.layout.data))
    return [by_phase, asleep, asleep_memory, promised, total, available, merging, saved, cpu, free]


def _of_agent(own: Reading, tasks: int) -> list[Family]:
    info = Family("atoll_agent_info", "gauge", "The agent's version.")
    info.add(1, version=__version__)
    cpu = Family("atoll_agent_cpu_seconds_total", "counter", "Processor time of the agent's.")
    cpu.add(own.cpu_seconds)
    resident = Family("atoll_agent_memory_resident_bytes", "gauge", "Memory of the agent's.")
    resident.add(own.resident)
    running = Family("atoll_agent_tasks", "gauge", "Tasks that run.")
    running.add(tasks)
    return [info, cpu, resident, running]
