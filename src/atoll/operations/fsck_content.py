"""The thorough part of `fsck`: what is in the files.

Layers and plain files never change, so they are read without a lock; one that is gone by then was removed, and nothing
is wrong. The disks of stopped VMs are looked at without a lock first too: only what looks wrong then is looked at once
more with its VM locked, so that it can't have been a VM that was being started.
"""

from pathlib import Path

from msgspec.structs import replace

from atoll.errors import AtollError, Busy, ImageRefused, MissingTool, RecordsFailed, StorageFailed
from atoll.host import disks, process
from atoll.images.source import digest, opened
from atoll.layout import Layout
from atoll.model.finding import Finding
from atoll.model.names import SHORT_ID
from atoll.model.operation import Progress
from atoll.model.spec import DiskSpec
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.fsck_look import heads_of, lost, of_vm
from atoll.operations.fsck_users import User, users_of
from atoll.operations.services import Report, Services

PATIENCE = 10.0
"""Seconds that a VM's lock is waited for; who holds it longer has its VM left out, which is told."""


def busy(thing: str, error: Busy) -> Finding:
    return Finding(
        kind="busy",
        thing=thing,
        detail=f"not checked: {error.why}",
        severity="note",
        next_step="Run `atoll fsck` again when that has ended; `atoll operation ls` shows it.",
    )


async def check_content(services: Services, *, repair: bool, report: Report) -> list[Finding]:
    """What is wrong inside. Raises `RecordsFailed`."""
    can_check, found = True, []
    try:
        process.find("qemu-img")
    except MissingTool as error:
        can_check = False
        found.append(
            Finding(
                kind="unchecked",
                thing="disks",
                detail=f"they can't be checked: {error.what}",
                severity="warning",
                next_step=error.next_step,
            )
        )
    found += await _frozen(services, report, can_check=can_check)
    if can_check:
        found += await _heads(services, report, repair=repair)
    return found


class _Sum:
    """Progress over many files, in bytes."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def part(self, progress: Progress) -> None:
        self._report(replace(progress, done=self._done + progress.done, total=self._total))

    def add(self, size: int) -> None:
        self._done += size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


async def _frozen(services: Services, report: Report, *, can_check: bool) -> list[Finding]:
    layout, records = services.layout, services.records.readable()
    users, known = users_of(records), {layer.id: layer for layer in records.layers}
    layers = [known[each] for each in sorted(users.layers) if each in known]
    sizes = [_size(layout.layer(layer.id)) for layer in layers] + [_size(layout.blob(each)) for each in users.blobs]
    told = _Sum(report, sum(sizes))
    found: list[Finding] = []
    for layer in layers:
        path, thing = layout.layer(layer.id), f"layer {layer.id[:SHORT_ID]}"
        why, sha256 = await _content(path, layer.sha256, told)
        if not why and can_check:
            checked = await disks.check(path)
            # Clusters that leaked in a frozen layer do no harm, and nobody may write it.
            why = _damage(checked)
        if not why and not layer.sha256 and sha256:
            _note(services, layer.id, sha256)
        if why and services.records.layer(layer.id) is not None:
            found += _told(layout, "layer-damaged", thing, why, path, users.layers[layer.id])
    for sha256, needed_by in sorted(users.blobs.items()):
        path = layout.blob(sha256)
        why, _ = await _content(path, sha256, told)
        if why:
            found += _told(layout, "blob-damaged", f"blob {sha256[:SHORT_ID]}", why, path, needed_by)
    return found


async def _content(path: Path, sha256: str, told: _Sum) -> tuple[str, str]:
    """What is wrong with a file's content (the quick look tells if it isn't there), and its SHA-256."""
    try:
        with opened(path) as source:
            came = await digest(source, report=told.part, step="read what is frozen")
            told.add(source.size)
    except (ImageRefused, StorageFailed) as error:
        return (error.why, "") if path.exists() else ("", "")
    if sha256 and came != sha256:
        return f"its content has changed: SHA-256 {came[:SHORT_ID]}…, not {sha256[:SHORT_ID]}…", came
    return "", came


def _damage(checked: disks.Checked) -> str:
    if not checked.corruptions:
        return ""
    last = f", such as: {checked.why}" if checked.why else ""
    return f"qemu-img finds {checked.corruptions} errors in its tables{last}"


def _told(layout: Layout, kind: str, thing: str, why: str, path: Path, users: list[User]) -> list[Finding]:
    """Nothing for a file that was removed meanwhile."""
    return [lost(kind, thing, f"{path} is damaged: {why}", path, users).finding] if path.exists() else []


def _note(services: Services, layer_id: str, sha256: str) -> None:
    """Whoever reads it next can tell whether it is still the same. Best effort: records may be read-only here."""
    try:
        services.records.note_sha256(layer_id, sha256)
    except RecordsFailed:
        return


# The disks of stopped VMs


async def _heads(services: Services, report: Report, *, repair: bool) -> list[Finding]:
    records = services.records.readable()
    stopped = [info.vm for info in observe.observe(services, records.vms, {}) if info.phase is Phase.STOPPED]
    found: list[Finding] = []
    for number, vm in enumerate(stopped):
        report(Progress(step="disks of stopped VMs", done=number, total=len(stopped), unit="steps"))
        for path, disk in heads_of(services.layout, vm).items():
            if path.exists() and await disks.check(path) != disks.Checked():
                found += await _head(services, vm, path, disk, repair=repair)
    return found


async def _head(services: Services, vm: Vm, path: Path, disk: DiskSpec, *, repair: bool) -> list[Finding]:
    """Look at a disk again that nobody else works on."""
    try:
        async with services.lease(vm.id, what=vm.name, timeout=PATIENCE):
            now = services.records.vm(vm.id)
            if now is None or path not in heads_of(services.layout, now) or not path.exists():
                return []
            if observe.phase_of(services, now) is not Phase.STOPPED:
                return []
            return await _head_now(services, now, path, disk, repair=repair)
    except Busy as error:
        return [busy(f"VM {vm.name}", error)]


async def _head_now(services: Services, vm: Vm, path: Path, disk: DiskSpec, *, repair: bool) -> list[Finding]:
    checked = await disks.check(path)
    thing = f"VM {vm.name}, disk '{disk.name}'"
    if checked.corruptions:
        kept = {node.vm_id for node in services.records.snapshots(vm.id)}
        return [of_vm(vm, "head", thing, f"{path} is damaged: {_damage(checked)}", kept, path).finding]
    if not checked.leaks:
        return []
    finding = Finding(
        kind="leaks",
        thing=thing,
        detail=f"{checked.leaks} clusters of {path} are taken and hold nothing, as after a crash; no harm is done",
        severity="note",
        repair="give their room back",
    )
    if repair:
        try:
            after = await disks.check(path, mend_leaks=True)
        except AtollError as error:
            return [replace(finding, detail=f"{finding.detail}; they can't be mended: {error}")]
        finding = replace(finding, repaired=not after.corruptions)
    return [finding]
