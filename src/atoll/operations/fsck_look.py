"""One quick look at all files and records for `fsck`: what is there, with its mode and its first bytes.

Nothing is locked and nothing is changed, so what is found may be an operation at work: `fsck` looks again before it
tells. Names of files are read before the records are, so what is made meanwhile isn't taken for a leftover.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AtollError
from atoll.host import facts
from atoll.images import qcow2
from atoll.images.source import SourceFile, opened
from atoll.layout import Layout
from atoll.model.finding import Finding
from atoll.model.image import Layer
from atoll.model.names import SHORT_ID
from atoll.model.operation import Operation
from atoll.model.spec import DiskSpec
from atoll.model.units import format_size
from atoll.model.vm import Vm
from atoll.operations.collect import collect, size_of
from atoll.operations.fsck_users import User, Users, give_up, names, users_of
from atoll.operations.services import Services
from atoll.qemu import mapped_ram
from atoll.store.records import Readable


class Suspect(Struct, frozen=True, kw_only=True):
    """Something that looks wrong."""

    finding: Finding
    path: Path | None = None
    vm_id: str | None = None
    """The VM under whose lock it has to be looked at again; else that is the images' lock."""

    @property
    def key(self) -> tuple[str, str]:
        return self.finding.kind, self.finding.thing


def look(services: Services) -> list[Suspect]:
    """All that looks wrong. Raises `RecordsFailed`."""
    layout = services.layout
    folders = sorted(layout.vms.iterdir()) if layout.vms.is_dir() else []
    records = services.records.readable()
    users = users_of(records)
    found = [*_records(layout, records), *_layers(layout, records, users), *_blobs(layout, users)]
    found += [*_memory(layout, records, users), *_snapshots(records), *_vms(layout, records)]
    found += [*_folders(folders, records), *_operations(records)]
    errors = any(each.finding.severity == "error" for each in found)
    if not errors and not any(_leaves_things_for_a_moment(each) for each in records.unfinished):
        found += _unneeded(services)
    return found


def _records(layout: Layout, records: Readable) -> Iterator[Suspect]:
    for each in records.unreadable:
        yield Suspect(
            finding=Finding(
                kind="record-damaged",
                thing=each.thing,
                detail=f"its record can't be read: {each.why}",
                severity="error",
                next_step=f"It may be of a newer Atoll: upgrade, or restore {layout.database} from a backup.",
            )
        )


# Layers, plain files, memory


def lost(kind: str, thing: str, detail: str, path: Path, users: list[User]) -> Suspect:
    way_out = f"Restore {path} from a backup; or give up what needs it: {give_up(users)}."
    finding = Finding(kind=kind, thing=thing, detail=detail, severity="error", affected=names(users), next_step=way_out)
    return Suspect(finding=finding, path=path)


def _layers(layout: Layout, records: Readable, users: Users) -> Iterator[Suspect]:
    known = {layer.id: layer for layer in records.layers}
    for layer_id, needed_by in sorted(users.layers.items()):
        path, thing = layout.layer(layer_id), f"layer {layer_id[:SHORT_ID]}"
        layer = known.get(layer_id)
        if layer is None:
            yield lost("layer-unrecorded", thing, "it is needed, and there is no record of it", path, needed_by)
            continue
        if _stands_on_itself(layer, known):
            yield lost("layer-circle", thing, "the layers below it lead back to it", layout.database, needed_by)
        yield from _file("layer", thing, path, needed_by, partial(_check_layer, layer=layer))


def _stands_on_itself(layer: Layer, known: dict[str, Layer]) -> bool:
    seen: set[str] = set()
    below = layer.parent
    while below is not None and below in known and below not in seen:
        if below == layer.id:
            return True
        seen.add(below)
        below = known[below].parent
    return below == layer.id


def _check_layer(source: SourceFile, layer: Layer) -> None:
    size = qcow2.virtual_size(source, layered=True)
    if size < layer.virtual_size:
        raise source.refused(f"it has a disk of {format_size(size)}, not of {format_size(layer.virtual_size)}")


def _blobs(layout: Layout, users: Users) -> Iterator[Suspect]:
    for sha256, needed_by in sorted(users.blobs.items()):
        yield from _file("blob", f"blob {sha256[:SHORT_ID]}", layout.blob(sha256), needed_by, lambda source: None)


def _memory(layout: Layout, records: Readable, users: Users) -> Iterator[Suspect]:
    for memory_id, needed_by in sorted(users.memory.items()):
        thing, path = f"memory {memory_id[:SHORT_ID]}", layout.memory_file(memory_id)
        for each in _file("memory", thing, path, needed_by, _check_memory):
            yield each if each.finding.severity != "error" else _with_way_out(each, memory_id, records)


def _with_way_out(suspect: Suspect, memory_id: str, records: Readable) -> Suspect:
    """Without its memory the disks of a snapshot or of a suspended VM are still there."""
    ways = [f"`atoll clone {n.id[:SHORT_ID]} NEW`" for n in records.snapshots if n.memory and n.memory.id == memory_id]
    ways += [f"`atoll stop --force {v.name}`" for v in records.vms if v.suspended and v.suspended.id == memory_id]
    way_out = f"Restore {suspect.path} from a backup. The disks are there without it: {', '.join(ways)}."
    return _replaced(suspect, next_step=way_out)


def _replaced(suspect: Suspect, **changes: str) -> Suspect:
    return replace(suspect, finding=replace(suspect.finding, **changes))


def _check_memory(source: SourceFile) -> None:
    if not mapped_ram.has_blocks(source.descriptor):
        # A plain stream, of a QEMU before 9.0, says only to its reader whether it is whole.
        if os.pread(source.descriptor, 4, 0) != b"QEVM":
            raise source.refused("it is no stream of QEMU's")
        return
    end = max(block.end for block in mapped_ram.blocks(source.descriptor))
    if source.size < end:
        raise source.refused(f"it ends after {source.size} bytes, and its pages go on up to {end}")


def _file(
    kind: str, thing: str, path: Path, users: list[User], check: Callable[[SourceFile], None]
) -> Iterator[Suspect]:
    """What can be seen of a frozen file that is needed."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        with opened(path) as source:
            check(source)
    except FileNotFoundError:
        yield lost(f"{kind}-missing", thing, f"{path} is not there", path, users)
    except (AtollError, OSError) as error:
        why = error.why if isinstance(error, AtollError) else str(error)
        if not os.path.lexists(path):  # it went between two looks
            yield lost(f"{kind}-missing", thing, f"{path} is not there", path, users)
        else:
            yield lost(f"{kind}-damaged", thing, f"{path} is damaged: {why}", path, users)
    else:
        if mode & 0o222 or not mode & 0o400:
            yield Suspect(
                finding=Finding(
                    kind="mode",
                    thing=thing,
                    detail=f"{path} has the mode {mode:04o}, and nobody may write it",
                    severity="warning",
                    repair="give it the mode 0444",
                ),
                path=path,
            )


# VMs and snapshots


def _snapshots(records: Readable) -> Iterator[Suspect]:
    for node in records.snapshots:
        if node.vm_id not in records.vm_ids:
            yield Suspect(
                finding=Finding(
                    kind="snapshot-alone",
                    thing=f"snapshot {node.vm_name}@{node.name}",
                    detail="its VM is gone",
                    severity="warning",
                    next_step=f"`atoll clone {node.id[:SHORT_ID]} NEW` makes a VM of it.",
                )
            )


def _vms(layout: Layout, records: Readable) -> Iterator[Suspect]:
    kept = {node.vm_id for node in records.snapshots}
    for vm in records.vms:
        for path, disk in heads_of(layout, vm).items():
            if why := _head_flaw(path):
                yield of_vm(vm, "head", f"VM {vm.name}, disk '{disk.name}'", f"{path} {why}", kept, path)
        nvram = layout.vm(vm.id).nvram
        if vm.spec.boot.firmware == "uefi" and not nvram.exists():
            detail = f"its UEFI variables are lost: {nvram} is not there"
            lost = of_vm(vm, "nvram", f"VM {vm.name}", detail, kept, nvram)
            yield _replaced(lost, repair="give it the firmware's empty ones")


def heads_of(layout: Layout, vm: Vm) -> dict[Path, DiskSpec]:
    """The disks that are written, of now and of the next start."""
    disks = [disk for spec in (vm.spec, vm.pending) if spec for disk in spec.disks if disk.head]
    return {layout.vm(vm.id).head(disk): disk for disk in disks}


def _head_flaw(path: Path) -> str:
    """A running QEMU may be writing it, so no more than the first bytes are looked at."""
    try:
        with path.open("rb") as file:
            return "" if file.read(4) == qcow2.MAGIC else "doesn't begin as a disk does"
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"can't be read: {error.strerror}"


def of_vm(vm: Vm, kind: str, thing: str, detail: str, kept: set[str], path: Path) -> Suspect:
    back = f"go back to a snapshot (`atoll history {vm.name}`)" if vm.id in kept else f"`atoll rm --force {vm.name}`"
    missing = not os.path.lexists(path)
    finding = Finding(
        kind=f"{kind}-missing" if missing else f"{kind}-damaged",
        thing=thing,
        detail=detail,
        severity="error",
        affected=(f"VM {vm.name}",),
        next_step=f"Restore that file from a backup, or {back}.",
    )
    return Suspect(finding=finding, path=path, vm_id=vm.id)


# What is too much, or unfinished


def _folders(folders: Iterable[Path], records: Readable) -> Iterator[Suspect]:
    for path in folders:
        if path.name not in records.vm_ids and path.is_dir():
            empty = not any(path.iterdir())
            yield Suspect(
                finding=Finding(
                    kind="folder",
                    thing=f"folder {path.name[:SHORT_ID]}",
                    detail=f"{path} ({format_size(size_of(path))}) is of no VM that is recorded",
                    severity="note",
                    repair="remove it, since it is empty" if empty else "",
                    next_step="" if empty else "Its disks may be of use to you; if not, remove it.",
                ),
                path=path,
            )


def _operations(records: Readable) -> Iterator[Suspect]:
    for operation in records.unfinished:
        if operation.state != "stuck" and facts.is_alive(operation.owner):
            continue
        short, why = operation.id[:SHORT_ID], f": {operation.error}" if operation.error else ""
        yield Suspect(
            finding=Finding(
                kind="operation",
                thing=f"operation {short}",
                detail=f"'{operation.verb} {operation.subject_name}' is unfinished{why}",
                severity="warning",
                next_step=f"`atoll operation retry {short}` goes on with it, `… cancel {short}` undoes it.",
            )
        )


def _leaves_things_for_a_moment(operation: Operation) -> bool:
    """Whether it first takes away what needs a file, and then the file itself, as `rm` and `start` do."""
    return operation.verb != "image" and operation.state != "stuck" and facts.is_alive(operation.owner)


def _unneeded(services: Services) -> Iterator[Suspect]:
    """Known only where everything that could need it can be read."""
    for name, size in collect(services, dry_run=True):
        yield Suspect(
            finding=Finding(
                kind="unneeded",
                thing=name,
                detail=f"nothing needs it; it takes {format_size(size)}",
                severity="note",
                repair="remove it, as `atoll prune` does",
            )
        )
