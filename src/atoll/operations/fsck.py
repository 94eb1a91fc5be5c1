"""fsck: is everything there and whole; and the mending of what can be mended without loss.

    records    SQLite's own check, and whether every record can be read
    files      one quick look without a lock (`fsck_look`); what looks wrong is looked at once more under the lock of
               whoever could be at work on it, and mended there
    content    what is in layers, plain files, and the disks of stopped VMs (`fsck_content`); not with `quick`

Without damage no lock is held. A frozen layer is never written; its mode is all that may be changed.
"""

import contextlib
from collections.abc import Iterable

from msgspec.structs import replace

from atoll.errors import AtollError, Busy, RecordsFailed, from_os_error
from atoll.model.finding import Finding, Severity
from atoll.model.operation import Progress
from atoll.operations.collect import collect
from atoll.operations.create import IMAGES_LOCK, copy_variables, firmware_for
from atoll.operations.fsck_content import PATIENCE, busy, check_content
from atoll.operations.fsck_look import Suspect, look
from atoll.operations.services import Report, Services

_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


async def fsck(
    *, services: Services, repair: bool = False, quick: bool = False, report: Report | None = None
) -> list[Finding]:
    """What is wrong, the worst first. Raises `StorageFailed`; damaged records are a finding too."""
    tell = report or (lambda progress: None)
    try:
        tell(Progress(step="records"))
        found = _check_records(services, repair=repair, quick=quick)
        tell(Progress(step="files"))
        found += await _check_files(services, repair=repair)
        if not quick:
            # The quick look may have seen the same damage, and said it better.
            seen = {(finding.kind, finding.thing) for finding in found}
            inside = await check_content(services, repair=repair, report=tell)
            found += [finding for finding in inside if (finding.kind, finding.thing) not in seen]
    except RecordsFailed as error:
        found = [
            Finding(
                kind="records",
                thing="records",
                detail=error.why or error.what,
                severity="error",
                next_step=error.next_step,
            )
        ]
    except OSError as error:
        raise from_os_error(error, "look at all files") from error
    return sorted(found, key=lambda finding: _ORDER[finding.severity])


def _check_records(services: Services, *, repair: bool, quick: bool) -> list[Finding]:
    records = services.records
    flaws = records.flaws(quick=quick)
    left = flaws
    if repair and any(flaw.repair for flaw in flaws):
        # What can't be mended, for the disk is full or there is more damage, is told as what it is.
        with contextlib.suppress(RecordsFailed):
            records.mend()
        left = records.flaws(quick=quick)
    return [
        Finding(
            kind="records",
            thing="records",
            detail=flaw.why,
            severity="warning" if flaw.harmless else "error",
            repair=flaw.repair,
            repaired=flaw not in left,
            next_step="" if flaw.repair else f"Restore {services.layout.database} from a backup.",
        )
        for flaw in flaws
    ]


async def _check_files(services: Services, *, repair: bool) -> list[Finding]:
    seen = look(services)
    found: list[Finding] = []
    if any(suspect.vm_id is None for suspect in seen):
        found += await _check_shared(services, {suspect.key for suspect in seen}, repair=repair)
    for vm_id in dict.fromkeys(suspect.vm_id for suspect in seen if suspect.vm_id is not None):
        found += await _check_vm(services, vm_id, repair=repair)
    return found


async def _check_shared(services: Services, keys: set[tuple[str, str]], *, repair: bool) -> list[Finding]:
    """Look again at what VMs share, while nobody adds to it or removes of it."""
    try:
        async with services.lease(IMAGES_LOCK, what="the images"):
            again = [suspect for suspect in look(services) if suspect.vm_id is None and suspect.key in keys]
            return await _mended(services, again) if repair else [suspect.finding for suspect in again]
    except Busy as error:
        return [busy("layers and memory", error)]


async def _check_vm(services: Services, vm_id: str, *, repair: bool) -> list[Finding]:
    """Look again at a VM that nobody else works on."""
    vm = services.records.vm(vm_id)
    if vm is None:
        return []
    try:
        async with services.lease(vm_id, what=vm.name, timeout=PATIENCE):
            if any(each.subject == vm_id for each in services.records.operations(unfinished=True)):
                # It is half done, and told as that.
                return []
            again = [suspect for suspect in look(services) if suspect.vm_id == vm_id]
            return await _mended(services, again) if repair else [suspect.finding for suspect in again]
    except Busy as error:
        return [busy(f"VM {vm.name}", error)]


async def _mended(services: Services, suspects: Iterable[Suspect]) -> list[Finding]:
    """The findings, after mending those that can be mended. The caller holds the lock that goes with them."""
    everything = list(suspects)
    found = []
    for suspect in everything:
        finding = suspect.finding
        if finding.repair and finding.kind != "unneeded":
            try:
                await _mend(services, suspect)
                finding = replace(finding, repaired=True)
            except (AtollError, OSError) as error:
                finding = replace(finding, detail=f"{finding.detail}; it can't be mended: {error}")
        found.append(finding)
    if any(finding.kind == "unneeded" for finding in found):
        removed = {name for name, _ in collect(services, dry_run=False)}
        found = [
            replace(each, repaired=True) if each.kind == "unneeded" and each.thing in removed else each
            for each in found
        ]
    return found


async def _mend(services: Services, suspect: Suspect) -> None:
    path = suspect.path
    assert path is not None
    match suspect.finding.kind:
        case "mode":
            path.chmod(0o444)
        case "folder":
            path.rmdir()
        case "nvram-missing":
            vm = services.vm(suspect.vm_id or "")
            firmware = await firmware_for(vm.spec)
            if firmware is not None:
                copy_variables(firmware, path)
