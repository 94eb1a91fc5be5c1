"""diff: what differs between two VMs or snapshots, in their settings and on their disks.

Nothing is changed, copied or mounted. Of a VM that runs the disks are read as they are at that moment: what its guest
hasn't written yet isn't there, and what it writes meanwhile may be seen by half.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from msgspec import Struct

from atoll.errors import NotFound, from_os_error
from atoll.host import disks
from atoll.host.block_reader import BlockReader, reading
from atoll.model.difference import Difference, DiskDifference, SettingDifference
from atoll.model.operation import Progress
from atoll.model.snapshot import Snapshot
from atoll.model.spec import DiskSpec, VmSpec
from atoll.model.units import format_size, parse_size
from atoll.model.vm import Vm
from atoll.operations.clone import find_source
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.diff_disks import Range, compare
from atoll.operations.services import Report, Services
from atoll.qemu.plan import layer_chain

_ORDER = "boot order of the disks"


class Pair(Struct, frozen=True, kw_only=True):
    """A disk of both sides: the files of its layers, the lowest first, and how many of them only that side has."""

    name: str
    old: tuple[Path, ...]
    new: tuple[Path, ...]
    old_above: int
    new_above: int

    @property
    def related(self) -> bool:
        return self.old_above < len(self.old)


class Opened(Struct, frozen=True, kw_only=True):
    pair: Pair
    old: BlockReader
    new: BlockReader
    ranges: list[Range]
    """Where the content may differ."""


async def diff(old: str, new: str, *, services: Services, report: Report | None = None) -> Difference:
    """What `new` has otherwise than `old`; each is a VM, `VM@SNAPSHOT`, or a snapshot's id.

    Raises `NotFound`, `InvalidInput`, `ProcessFailed`, `StorageFailed`.
    """
    sides = find_source(old, services), find_source(new, services)
    found: list[DiskDifference] = []
    async with contextlib.AsyncExitStack() as stack:
        async with _held(sides, services):
            # What is open stays readable whatever becomes of its file.
            opened = [await stack.enter_async_context(_open(pair)) for pair in _pairs(sides, services)]
        for disk in opened:
            difference = await _compare(disk, report) if disk.ranges else None
            found += [difference] if difference is not None else []
    return Difference(
        old=old,
        new=new,
        settings=tuple(_setting_differences(_spec(sides[0]), _spec(sides[1]))),
        disks=tuple(found),
        notes=tuple(_notes(sides)),
    )


@contextlib.asynccontextmanager
async def _held(sides: tuple[Vm | Snapshot, Vm | Snapshot], services: Services) -> AsyncIterator[None]:
    """No other operation moves the VMs' heads or removes layers."""
    vms = {side.id: side.name for side in sides if isinstance(side, Vm)}
    async with contextlib.AsyncExitStack() as stack:
        # Always in the same order, so that two of these don't wait for each other.
        for vm_id in sorted(vms):
            await stack.enter_async_context(services.lease(vm_id, what=vms[vm_id]))
        await stack.enter_async_context(services.lease(IMAGES_LOCK, what="the images"))
        yield


def _pairs(sides: tuple[Vm | Snapshot, Vm | Snapshot], services: Services) -> list[Pair]:
    layers = {layer.id: layer for layer in services.records.layers()}
    old, new = (_as_it_is_now(side, services) for side in sides)
    of_new = {disk.name: disk for disk in new.spec.disks if disk.blob is None}
    found = []
    for disk in old.spec.disks:
        if disk.blob is not None or disk.name not in of_new:
            continue
        chains = layer_chain(disk.layer, layers), layer_chain(of_new[disk.name].layer, layers)
        common = 0
        for one, other in zip(*chains, strict=False):
            if one != other:
                break
            common += 1
        files = [
            (*map(services.layout.layer, chain), *_head(side, spec, services))
            for chain, side, spec in zip(chains, (old, new), (disk, of_new[disk.name]), strict=True)
        ]
        found.append(
            Pair(
                name=disk.name,
                old=files[0],
                new=files[1],
                old_above=len(files[0]) - common,
                new_above=len(files[1]) - common,
            )
        )
    return found


def _as_it_is_now(side: Vm | Snapshot, services: Services) -> Vm | Snapshot:
    """Once nothing moves it. Raises `NotFound`."""
    if isinstance(side, Vm):
        return services.vm(side.id)
    node = services.records.snapshot(side.id)
    if node is None:
        raise NotFound(f"{side.vm_name}: the snapshot '{side.name}' is gone", "another command removed it")
    return node


def _head(side: Vm | Snapshot, disk: DiskSpec, services: Services) -> tuple[Path, ...]:
    return (services.layout.vm(side.id).head(disk),) if isinstance(side, Vm) and disk.head else ()


@contextlib.asynccontextmanager
async def _open(pair: Pair) -> AsyncIterator[Opened]:
    chains = [disks.chain_argument(files, shared=True) for files in (pair.old, pair.new)]
    async with reading(chains[0]) as old, reading(chains[1]) as new:
        ranges = await disks.allocated_ranges(pair.old, above=pair.old_above)
        ranges += await disks.allocated_ranges(pair.new, above=pair.new_above)
        yield Opened(pair=pair, old=old, new=new, ranges=ranges)


async def _compare(disk: Opened, report: Report | None) -> DiskDifference | None:
    def tell(done: int, total: int) -> None:
        if report is not None:
            report(Progress(step=f"compare the disk {disk.pair.name}", done=done, total=total, unit="bytes"))

    try:
        return await asyncio.to_thread(
            compare, disk.pair.name, disk.old, disk.new, disk.ranges, related=disk.pair.related, report=tell
        )
    except OSError as error:
        raise from_os_error(error, f"read the disk {disk.pair.name}") from error


def _spec(side: Vm | Snapshot) -> VmSpec:
    """Settings that wait for the next start count as set."""
    return (side.pending or side.spec) if isinstance(side, Vm) else side.spec


def _notes(sides: tuple[Vm | Snapshot, Vm | Snapshot]) -> list[str]:
    running = sorted({side.name for side in sides if isinstance(side, Vm) and side.run is not None})
    return [
        f"{name} runs: its disks were read as they were, without what its guest hasn't written yet" for name in running
    ]


def _setting_differences(old: VmSpec, new: VmSpec) -> list[SettingDifference]:
    before, after = settings(old), settings(new)
    if {disk.name for disk in old.disks} != {disk.name for disk in new.disks}:
        # That one was added or taken away is told already.
        del before[_ORDER], after[_ORDER]
    return [
        SettingDifference(name=name, old=before.get(name, ""), new=after.get(name, ""))
        for name in before | after
        if before.get(name, "") != after.get(name, "")
    ]


def settings(spec: VmSpec) -> dict[str, str]:
    """The settings by name. Network addresses and published ports aren't among them: they are each VM's own."""
    boot, cpu = spec.boot, spec.cpu
    found = {
        "arch": spec.arch,
        "machine": spec.machine,
        "machine type": spec.machine_type,
        "accelerator": spec.accelerator,
        "isolation": spec.isolation,
        "cpu limit": f"{spec.limits.cpus:g}" if spec.limits.cpus else "",
        "io limit": f"{_size(spec.limits.io_bytes)}/s" if spec.limits.io_bytes else "",
        "iops limit": str(spec.limits.io_operations or ""),
        "cpus": str(cpu.count),
        "cpus at most": str(cpu.maximum),
        "cpu model": cpu.model,
        "cpu sockets": str(cpu.sockets),
        "cpu threads": str(cpu.threads),
        "memory": _size(spec.memory),
        "firmware": boot.firmware,
        "kernel": _digest(boot.kernel),
        "initrd": _digest(boot.initrd),
        "kernel command line": boot.cmdline,
        "rom": _digest(boot.rom),
        "display": spec.display,
        "clock": spec.clock,
        "guest agent": "yes" if spec.guest.agent else "no",
        "first-boot seed": spec.guest.seed,
        "first-boot user": spec.seed.user or "",
        "ssh keys": ", ".join(spec.seed.ssh_keys),
    }
    found |= {f"disk {disk.name}": _disk(disk) for disk in spec.disks}
    found[_ORDER] = ", ".join(disk.name for disk in spec.disks)
    found |= {f"nic {nic.name}": f"{nic.model}{', restricted' if nic.restrict else ''}" for nic in spec.nics}
    return found


def _digest(sha256: str | None) -> str:
    return sha256[:12] if sha256 else ""


def _size(size: int) -> str:
    """For people, unless that isn't exact."""
    text = format_size(size)
    return text if parse_size(text) == size else f"{size} bytes"


def _disk(disk: DiskSpec) -> str:
    kind = f"{disk.bus}{' CD' if disk.media == 'cdrom' else ''}"
    return f"{_size(disk.size)} {kind}" + (f" {_digest(disk.blob)}" if disk.blob else "")
