"""rm

    step      do                                          undo
    put away  rename the VM's folder into `tmp`           rename it back
    forget    take the record away                        (point of no return)
    delete    remove the folder, sockets and locks

Its snapshots go with it. Layers that an image, a clone or another snapshot needs stay.
"""

import contextlib
import shutil
from pathlib import Path

from msgspec import Struct

from atoll.errors import AtollError, from_os_error
from atoll.host import cgroups, facts, files
from atoll.model.state import require
from atoll.model.vm import Vm
from atoll.operations import bells, networks, observe
from atoll.operations.collect import collect
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.services import Report, Services


class RemoveRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    name: str


async def remove(vm: Vm, *, services: Services, force: bool = False, report: Report | None = None) -> int:
    """Remove a stopped VM with its disks; a running one only with `force`. Raises `WrongState`.

    Returns how many snapshots went with it.
    """
    if force:
        from atoll.operations.stop import stop

        await stop(vm, services=services, force=True, report=report)
    request = RemoveRequest(vm_id=vm.id, name=vm.name)
    done = await perform(REMOVE, request, services=services, subject=vm.id, subject_name=vm.name, report=report)
    return int(done.notes["snapshots"])


def ended_throwaways(services: Services) -> list[Vm]:
    """VMs of `run --rm` that have ended by themselves, with nobody there to remove them. A quick look."""
    return [
        vm
        for vm in services.records.throwaways()
        if (vm.run is None and vm.last_exit is not None and vm.suspended is None)
        or (vm.run is not None and not facts.is_alive(vm.run))
    ]


async def remove_throwaways(services: Services) -> list[str]:
    """Remove them; returns a sentence about each."""
    told = []
    for vm in ended_throwaways(services):
        observe.observe_one(services, vm)
        request = RemoveRequest(vm_id=vm.id, name=vm.name)
        try:
            await perform(REMOVE, request, services=services, subject=vm.id, subject_name=vm.name, lock_timeout=0.0)
        except AtollError:
            # Another command is at it, or it was started again.
            continue
        told.append(f"'{vm.name}' had stopped; it was removed, as --rm asked.")
    return told


def _away(context: Context[RemoveRequest]) -> Path:
    return context.services.layout.temporary / f"rm-{context.subject}"


async def _put_away(context: Context[RemoveRequest]) -> None:
    vm = context.vm
    require(vm.name, observe.phase_of(context.services, vm), "rm")
    home, away = context.services.layout.vm(vm.id).home, _away(context)
    try:
        files.make_folder(away.parent)
        if home.exists():
            home.rename(away)
            files.sync_folder(home.parent)
    except OSError as error:
        raise from_os_error(error, f"remove {home}") from error


async def _put_back(context: Context[RemoveRequest]) -> None:
    away = _away(context)
    if away.exists():
        away.rename(context.services.layout.vm(context.subject).home)


async def _forget(context: Context[RemoveRequest]) -> None:
    records = context.services.records
    vm = records.vm(context.subject)
    # Not the rest that a killed command has left.
    context.notes.setdefault("snapshots", len(records.snapshots(context.subject)))
    if vm is not None:
        of_images = {layer for image in records.images() for layer in image.layer_ids}
        own = any(disk.layer not in of_images for disk in vm.spec.disks if disk.layer)
        context.notes["networks"] = networks.shared_by(vm.spec, vm.pending)
        context.notes["collect"] = own or vm.suspended is not None or bool(records.snapshots(vm.id))
    for node in records.snapshots(context.subject):
        records.remove_snapshot(node.id)
    if vm is not None:
        cgroups.remove(vm.id)
        records.remove_vm(context.subject)
        records.add_event("vm.removed", vm_id=context.subject, name=context.request.name)


async def _delete(context: Context[RemoveRequest]) -> None:
    layout = context.services.layout
    await bells.silence(layout.vm(context.subject))
    try:
        for folder in (_away(context), layout.vm(context.subject).run):
            if folder.exists():
                shutil.rmtree(folder)
    except OSError as error:
        raise from_os_error(error, f"remove {_away(context)}") from error
    if context.notes.get("collect"):
        async with context.services.lease(IMAGES_LOCK, what="the images"):
            collect(context.services, dry_run=False)
    await networks.tell_names(context.services, context.notes.get("networks", ()))
    # Who waits for the lock finds the record gone.
    with contextlib.suppress(OSError):
        layout.vm_use(context.subject).unlink(missing_ok=True)
        layout.vm_lock(context.subject).unlink()


REMOVE = Verb(
    name="rm",
    request=RemoveRequest,
    steps=(
        Step("put away", _put_away, _put_back),
        Step("forget", _forget, final=True),
        Step("delete", _delete),
    ),
)
