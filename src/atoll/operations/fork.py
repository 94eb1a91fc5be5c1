"""fork: running copies of one instant, their memory shared until they write it.

The source is kept (`snapshot`), each copy is made on that (`create`) with its memory as what it goes on from, and is
started (`start`). A snapshot that was taken for it is forgotten when all have started: what runs has mapped its memory.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence

from msgspec.structs import replace

from atoll.errors import AtollError, InvalidInput, StorageFailed, WrongState
from atoll.model.names import check_vm_name, new_id
from atoll.model.operation import Progress
from atoll.model.snapshot import Snapshot
from atoll.model.spec import VmSpec
from atoll.model.vm import Vm
from atoll.operations import guest_setup, networks, resolve_disks
from atoll.operations.create import CREATE, NewVm
from atoll.operations.engine import perform
from atoll.operations.guest_settle import NewCard, leave_word
from atoll.operations.history import forget
from atoll.operations.power import control
from atoll.operations.remove import remove
from atoll.operations.resolve import new_mac
from atoll.operations.services import Report, Services
from atoll.operations.snapshot import SnapshotOptions, free_name, snapshot
from atoll.operations.start import start

MOST = 1000
"""Copies that one command makes."""
TOGETHER = 100
"""Copies that are let go on at the same time; each takes two open files until then."""
_NUMBER = "{n}"
TIME_TO_ANSWER = 20.0
"""Seconds in which copies on a network take their addresses; those that don't take them at the next exchange."""


def names_of(pattern: str | None, count: int, *, source: str, taken: set[str]) -> list[str]:
    """A name for each copy: `{n}` in the pattern is a number, from 1 on. Raises `InvalidInput`."""
    if not 1 <= count <= MOST:
        raise InvalidInput(f"{count} copies can't be made", f"one command makes 1 to {MOST}")
    if pattern is not None and _NUMBER not in pattern:
        if count > 1:
            raise InvalidInput(
                f"'{pattern}' is one name for {count} copies",
                next_step=f"Put {_NUMBER} into it: '{pattern}-{_NUMBER}'.",
            )
        return [check_vm_name(pattern)]
    stem = pattern or f"{source}-{_NUMBER}"
    found: list[str] = []
    number = 0
    while len(found) < count:
        number += 1
        name = check_vm_name(stem.replace(_NUMBER, str(number)))
        if name not in taken:
            found.append(name)
    return found


async def fork(
    source: Vm | Snapshot, count: int, pattern: str | None, *, services: Services, report: Report | None = None
) -> list[Vm]:
    """Start `count` copies. If one fails, those that were made are removed again, and its error is raised.

    Raises `InvalidInput`, `WrongState` for a source without memory, `AlreadyExists`, `StorageFailed`, `EngineFailed`.
    """
    taken = {vm.name for vm in services.records.vms()}
    name = source.name if isinstance(source, Vm) else source.vm_name
    names = names_of(pattern, count, source=name, taken=taken)
    if isinstance(source, Snapshot):
        return await copies(source, names, services, report)
    options = SnapshotOptions(
        name=free_name(services, source, "fork"), message="for copies that are being started", volatile=True
    )
    try:
        node = await snapshot(source, options, services=services, report=report)
    except StorageFailed:
        # Others may have taken the room that there was in memory.
        node = await snapshot(source, replace(options, volatile=False), services=services, report=report)
    try:
        return await copies(node, names, services, report)
    finally:
        await forget(services.vm(source.id), node, services=services)


async def copies(
    node: Snapshot, names: list[str], services: Services, report: Report | None, *, pool: str | None = None
) -> list[Vm]:
    """A running copy under each name; those for a pool stand still."""
    if node.memory is None:
        raise WrongState(
            f"'{node.name}' of {node.vm_name} has no memory to go on from",
            "it was taken of a stopped VM, or with --disk-only",
            f"Use `atoll clone {node.vm_name}@{node.name}`, or fork the running VM.",
        )
    # QEMU's own start is what takes the time, and it is the processors' alone.
    places = asyncio.Semaphore((os.cpu_count() or 1) + 1)
    made: list[Vm] = []

    async def one(name: str) -> None:
        async with places:
            made.append(await _copy(node, name, services, pool, hold=hold))
            if report is not None:
                report(Progress(step="start copies", done=len(made), total=len(names), unit="steps"))

    # The first of many would take processor time from the last, so they go on together once all are there.
    hold = pool is not None or len(names) > 1
    results = await asyncio.gather(*(one(name) for name in names), return_exceptions=True)
    if hold and pool is None and node.memory.running and len(made) == len(names):
        results = [result for some in _batches(made) for result in await _go_on(some, services)]
    failed = next((result for result in results if isinstance(result, BaseException)), None)
    if failed is not None:
        for vm in made:
            await remove(vm, services=services, force=True)
        raise failed
    if pool is None:
        for vm in made:
            settle_later(services, vm)
        await mount_shares(services, made)
    order = {name: index for index, name in enumerate(names)}
    return sorted(made, key=lambda vm: order[vm.name])


def _batches(vms: list[Vm]) -> list[list[Vm]]:
    return [vms[start : start + TOGETHER] for start in range(0, len(vms), TOGETHER)]


async def _go_on(vms: Sequence[Vm], services: Services) -> list[BaseException | None]:
    """Each is reached before the first is told: a guest that goes on takes processor time from all that comes after."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            monitors = []
            for vm in vms:
                await stack.enter_async_context(services.lease(vm.id, what=vm.name))
                monitors.append(await stack.enter_async_context(control(services, vm)))
        except AtollError as error:
            return [error]
        told = await asyncio.gather(*(monitor.execute("cont") for monitor in monitors), return_exceptions=True)
        return [each if isinstance(each, BaseException) else None for each in told]


async def mount_shares(services: Services, made: Sequence[Vm]) -> None:
    """Each copy gets the folders of its source from a server of its own."""
    if any(vm.spec.shares for vm in made):
        from atoll.operations.share import mount_each

        await mount_each(services, made)


def settle_later(services: Services, vm: Vm) -> None:
    """A copy on a network is cut off until it takes its own addresses, so it doesn't wait for the first exchange."""
    if networks.shared_by(vm.spec):
        services.later(guest_setup.settled(services, vm, timeout=TIME_TO_ANSWER))


async def _copy(node: Snapshot, name: str, services: Services, pool: str | None, *, hold: bool) -> Vm:
    assert node.memory is not None
    vm = Vm(
        id=new_id(),
        name=name,
        image=node.image,
        created_at=time.time(),
        spec=_own(node.spec, services),
        snapshot=node.id,
        suspended=replace(node.memory, shared=True),
        seeded=node.seeded,
        pool=pool,
    )
    request = NewVm(vm=vm, nvram=node.nvram, copy=True)
    await perform(CREATE, request, services=services, subject=vm.id, subject_name=name)
    _leave_addresses(services, node.spec, services.vm(vm.id))
    try:
        await start(services.vm(vm.id), services=services, hold=hold)
    except (AtollError, asyncio.CancelledError):
        await remove(services.vm(vm.id), services=services, force=True)
        raise
    return services.vm(vm.id)


def _leave_addresses(services: Services, source: VmSpec, vm: Vm) -> None:
    """Its memory has the source's addresses. Until the guest takes its own, nothing that it says on a network passes:
    there it is known by its own only.
    """
    cards = []
    for old, nic in zip(source.nics, vm.spec.nics, strict=True):
        network = services.records.network(nic.network) if nic.network else None
        if network is not None:
            address = f"{nic.address}/{network.subnet.partition('/')[2]}" if network.subnet else ""
            gateway = network.gateway if network.mode == "nat" else ""
            cards.append(NewCard(old=old.mac, mac=nic.mac, address=address, gateway=gateway))
    if cards and vm.spec.guest.agent:
        leave_word(services.layout.vm(vm.id), cards=tuple(cards))


def _own(spec: VmSpec, services: Services) -> VmSpec:
    """The machine with heads of its own and nothing published. Its network card is in its memory, address and all: a
    user-mode network is one's own, so that clashes with nobody. On a network it gets others.
    """
    nics = tuple(
        replace(nic, ports=()) if not nic.network else replace(nic, ports=(), mac=new_mac(), address=None)
        for nic in networks.still_here(services, spec.nics)
    )
    return replace(spec, nics=nics, disks=resolve_disks.with_heads(resolve_disks.without_heads(spec.disks)))
