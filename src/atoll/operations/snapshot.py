"""snapshot

    step      do                                                           undo
    check     phase, name, disks as they were when it was asked for
    heads     an empty new head for each disk                              remove those that aren't used
    cut       stop the guest, put QEMU on the new heads, begin to save     finish the cut, if QEMU has made it; the
              memory, let the guest go on; freeze the old heads            guest goes on
    memory    wait until all of the memory is written                      cancel that, remove the file
    record    the node, with the layers and the memory                     (point of no return)

The cut changes no content, so undoing it isn't needed: what is left is one layer more in the chain, which is merged
like any other (`operations/merge.py`). Disks and memory are of the same instant: the guest stands still from before the
disks are cut until writes to its memory are tracked.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, InvalidInput, StorageFailed, Unsupported, WrongState
from atoll.host import files
from atoll.model.names import check_snapshot_name, new_id
from atoll.model.snapshot import Memory, Snapshot
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import capture, heads, merge, template
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.resolve_disks import without_heads
from atoll.operations.services import Report, Services


class SnapshotRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    id: str
    name: str
    heads: dict[str, str]
    """The new head of each disk, by the disk's name."""
    message: str = ""
    memory: bool = True
    """Of a running or paused VM, its memory too."""
    quiesce: bool = False
    volatile: bool = False
    """Keep the memory among the templates, not with the snapshots."""


class SnapshotOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the user asked for."""

    name: str | None = None
    """`snap-1`, `snap-2` … when None."""
    message: str = ""
    disk_only: bool = False
    quiesce: bool = False
    volatile: bool = False
    """Its memory needn't last: it is for copies that start at once."""


async def snapshot(vm: Vm, options: SnapshotOptions, *, services: Services, report: Report | None = None) -> Snapshot:
    """Take a snapshot. Raises `InvalidInput`, `AlreadyExists` (name), `WrongState`, `StorageFailed`, `GuestFailed`."""
    _check_options(vm, options)
    request = SnapshotRequest(
        vm_id=vm.id,
        id=new_id(),
        name=options.name or free_name(services, vm),
        heads=capture.new_heads(services, vm),
        message=options.message,
        memory=not options.disk_only,
        quiesce=options.quiesce,
        volatile=options.volatile and template.folder(services.layout, vm.spec.memory) is not None,
    )
    try:
        await perform(SNAPSHOT, request, services=services, subject=vm.id, subject_name=vm.name, report=report)
    except AlreadyExists:
        if options.name is not None:
            raise
        # Another process took the name that was made up.
        return await snapshot(services.vm(vm.id), options, services=services, report=report)
    taken = services.records.snapshot(request.id)
    if taken is None:
        raise WrongState(f"{vm.name}: the snapshot '{request.name}' is gone", "another command removed it")
    merge.begin(services, vm.id)
    return taken


def _check_options(vm: Vm, options: SnapshotOptions) -> None:
    if options.name is not None:
        check_snapshot_name(options.name)
    if options.quiesce and not options.disk_only:
        raise InvalidInput(
            "--quiesce goes with --disk-only", "a snapshot with memory has what the guest hasn't written yet"
        )
    if options.quiesce and not vm.spec.guest.agent:
        raise Unsupported(f"{vm.name}: its file systems can't be frozen", "it has no guest agent", "Leave it away.")


def free_name(services: Services, vm: Vm, stem: str = "snap") -> str:
    """`snap-1`, `snap-2` …: the first that the VM's history doesn't have."""
    taken = {snapshot.name for snapshot in services.records.snapshots(vm.id)}
    return next(name for number in range(1, len(taken) + 2) if (name := f"{stem}-{number}") not in taken)


async def _check(context: Context[SnapshotRequest]) -> None:
    vm, request = context.vm, context.request
    if any(s.name == request.name for s in context.services.records.snapshots(vm.id)):
        raise AlreadyExists(
            f"{vm.name} has a snapshot '{request.name}' already",
            next_step=f"Choose another name, or `atoll forget {vm.name} {request.name}` first.",
        )
    capture.check(context, request.heads)


async def _make_heads(context: Context[SnapshotRequest]) -> None:
    await capture.make_heads(context, context.request.heads)


async def _remove_heads(context: Context[SnapshotRequest]) -> None:
    capture.remove_heads(context, context.request.heads)


def _memory(context: Context[SnapshotRequest]) -> Path:
    """Where the memory is written until it is whole."""
    layout, request = context.services.layout, context.request
    return (layout.templates if request.volatile else layout.temporary) / f"memory-{request.id}"


def _variables(context: Context[SnapshotRequest]) -> Path:
    return context.services.layout.temporary / f"nvram-{context.request.id}"


async def _cut(context: Context[SnapshotRequest]) -> None:
    request, layout = context.request, context.services.layout
    # Another command may have removed the folder since it was chosen, because it was empty.
    if request.volatile and template.folder(layout, 0) is None:
        raise StorageFailed(f"{context.vm.name}: {layout.templates} can't be used", next_step="Try again.")
    wanted = capture.Cut(
        heads=request.heads, memory=_memory(context) if request.memory else None, nvram=_variables(context)
    )
    if request.quiesce and context.notes["phase"] == Phase.RUNNING:
        async with frozen(context):
            await capture.cut(context, wanted)
    else:
        await capture.cut(context, wanted)


@contextlib.asynccontextmanager
async def frozen(context: Context[Any]) -> AsyncIterator[None]:
    """The guest's file systems, frozen. Raises `GuestFailed` when the agent can't."""
    from atoll.operations.guest_agent import exchange

    paths = context.services.layout.vm(context.subject)
    async with exchange(paths, context.vm.name) as agent:
        await agent.freeze()
    try:
        yield
    finally:
        async with exchange(paths, context.vm.name) as agent:
            await agent.thaw()


async def _finish_cut(context: Context[SnapshotRequest]) -> None:
    # The saving of the memory began here.
    await capture.drop_memory(context, _memory(context))
    await capture.finish_cut(context, context.request.heads)
    _variables(context).unlink(missing_ok=True)


async def _await_memory(context: Context[SnapshotRequest]) -> None:
    if context.notes.get("saving"):
        await capture.await_memory(context, _memory(context))


async def _drop_memory(context: Context[SnapshotRequest]) -> None:
    await capture.drop_memory(context, _memory(context))


async def _record(context: Context[SnapshotRequest]) -> None:
    services = context.services
    # Files that aren't recorded yet look to `prune` like ones that nothing needs.
    async with services.lease(IMAGES_LOCK, what="the images"):
        if services.records.snapshot(context.request.id) is None:
            node = _node(context)
            services.records.freeze(replace(context.vm, snapshot=node.id), [], node)
            data = {"snapshot": node.name, "id": node.id}
            services.records.add_event("vm.snapshot", vm_id=context.subject, name=context.vm.name, data=data)


def _node(context: Context[SnapshotRequest]) -> Snapshot:
    """The record to be, its files under their last names."""
    vm, request, notes = context.vm, context.request, context.notes
    runs = notes["phase"] == Phase.RUNNING
    memory = None
    if notes.get("saving"):
        memory = Memory(
            id=request.id, file_size=0, accelerator=notes["accelerator"], running=runs, volatile=request.volatile
        )
        memory = replace(
            memory, file_size=adopt(_memory(context), template.memory_path(context.services.layout, memory))
        )
    if "nvram" in notes:
        adopt(_variables(context), context.services.layout.blob(notes["nvram"]))
    return Snapshot(
        id=request.id,
        name=request.name,
        vm_id=vm.id,
        vm_name=vm.name,
        image=vm.image,
        created_at=notes["at"],
        spec=replace(vm.spec, disks=without_heads(vm.spec.disks)),
        parent=vm.snapshot,
        message=request.message,
        memory=memory,
        nvram=notes.get("nvram"),
        quiesced=request.quiesce and runs,
        seeded=vm.seeded,
    )


def adopt(temporary: Path, final: Path) -> int:
    """Freeze a file under its last name, unless that was done; returns the bytes that it takes on the disk."""
    files.make_folder(final.parent)
    if final.exists():
        temporary.unlink(missing_ok=True)
    else:
        files.freeze(temporary, final)
    return heads.allocated(final)


SNAPSHOT = Verb(
    name="snapshot",
    request=SnapshotRequest,
    steps=(
        Step("check", _check),
        Step("heads", _make_heads, _remove_heads),
        Step("cut", _cut, _finish_cut),
        Step("memory", _await_memory, _drop_memory),
        Step("record", _record, final=True),
    ),
)
