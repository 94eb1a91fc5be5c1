"""merge

    step      do                                                                undo
    check     that the layers are there, one on the other
    copy      a new file with what they have, on what is below them             remove it
    adopt     freeze it as a layer; whoever stood on the last one stands on it   (point of no return)
    relink    put QEMUs that run on it too; remove what nobody needs any more

Every snapshot, and every fork of a running VM, makes a chain a layer longer. Merging keeps chains within
`model.chain.LONGEST`, in the background, at low priority. The content of no disk changes, and no layer is written:
other branches, and snapshots within the window, keep the old ones.
"""

import contextlib
import os
import subprocess
import sys
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

from msgspec import Struct

from atoll.errors import AtollError, WrongState
from atoll.host import disks, files
from atoll.layout import Layout
from atoll.model.chain import LONGEST, window_to_merge
from atoll.model.image import Layer
from atoll.model.names import new_id
from atoll.model.spec import DiskSpec
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.collect import collect
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.heads import allocated
from atoll.operations.merge_content import merge_content
from atoll.operations.power import control
from atoll.operations.relink import relink
from atoll.operations.services import Report, Services
from atoll.qemu.plan import layer_chain

MERGE_LOCK = "merge"
"""One merge at a time: it reads and writes as fast as the disk can."""


class MergeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    """Of the layer to be."""
    window: tuple[str, ...]
    """The layers to merge, lowest first."""
    copies: dict[str, str]
    """The last of them, so that all are kept while they are read."""


async def merge(*, services: Services, vm_id: str | None = None, report: Report | None = None) -> int:
    """Merge until the chains of all VMs' disks, or of this one's, are short enough; returns how many merges that took.

    Raises `StorageFailed`, `EngineFailed`, `Busy`; nothing is lost then.
    """
    done = 0
    while (found := _next(services, vm_id)) is not None:
        name, window = found
        request = MergeRequest(id=new_id(), window=window, copies={"last": window[-1]})
        await perform(MERGE, request, services=services, subject=MERGE_LOCK, subject_name=name, report=report)
        done += 1
    return done


def begin(services: Services, vm_id: str) -> None:
    """Have a process of its own merge the VM's chains if they are too long; nobody waits for it."""
    if _next(services, vm_id) is None:
        return
    folders = [str(folder) for folder in astuple(services.layout)]
    with contextlib.suppress(OSError):
        subprocess.Popen(
            [sys.executable, "-m", "atoll.operations.merge", vm_id, *folders],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def _next(services: Services, vm_id: str | None) -> tuple[str, tuple[str, ...]] | None:
    """The name of a VM with a chain that is too long, and the layers of it to merge."""
    records = services.records
    layers = {layer.id: layer for layer in records.layers()}
    needed: set[str] | None = None
    for each in [vm for vm in records.vms() if vm_id in (None, vm.id)]:
        for disk in _disks(each):
            chain = [layers[layer] for layer in layer_chain(disk.layer, layers)]
            if len(chain) > LONGEST:
                needed = _stood_on(services, layers) if needed is None else needed
                window = window_to_merge(chain, needed)
                assert window is not None
                return each.name, tuple(layer.id for layer in chain[window[0] : window[1] + 1])
    return None


def _disks(vm: Vm) -> list[DiskSpec]:
    return [disk for spec in (vm.spec, vm.pending) if spec for disk in spec.disks if disk.layer and not disk.blob]


def _stood_on(services: Services, layers: dict[str, Layer]) -> set[str]:
    """Layers that heads, snapshots and images stand on, and those with several layers on them."""
    records = services.records
    found = {disk.layer for vm in records.vms() for disk in _disks(vm) if disk.layer}
    found |= {layer for node in records.snapshots() for layer in node.layer_ids}
    found |= {layer for image in records.images() for layer in image.layer_ids}
    parents = [layer.parent for layer in layers.values() if layer.parent]
    return found | {parent for parent in parents if parents.count(parent) > 1}


async def _check(context: Context[MergeRequest]) -> None:
    _window(context)


def _window(context: Context[MergeRequest]) -> list[Layer]:
    """The records of the layers. Raises `WrongState` when they aren't one on the other any more."""
    records = context.services.records
    found = [layer for each in context.request.window if (layer := records.layer(each)) is not None]
    chained = all(upper.parent == lower.id for lower, upper in pairwise(found))
    if len(found) < len(context.request.window) or not chained:
        raise WrongState(
            "the layers can't be merged", "another command has changed their chain meanwhile", "Try again."
        )
    return found


async def _copy(context: Context[MergeRequest]) -> None:
    services, window = context.services, _window(context)
    layers = {layer.id: layer for layer in services.records.layers()}
    files.make_folder(services.layout.temporary)
    path = services.layout.temporary / f"merge-{context.request.id}"
    chain = [services.layout.layer(layer) for layer in layer_chain(window[-1].id, layers)]
    await disks.create_head(path, size=window[-1].virtual_size, empty=services.layout.empty_disks)
    await merge_content(chain, path, count=len(window), report=context.report)


async def _remove(context: Context[MergeRequest]) -> None:
    (context.services.layout.temporary / f"merge-{context.request.id}").unlink(missing_ok=True)


async def _adopt(context: Context[MergeRequest]) -> None:
    services, request = context.services, context.request
    temporary, path = services.layout.temporary / f"merge-{request.id}", services.layout.layer(request.id)
    async with contextlib.AsyncExitStack() as held:
        for vm_id, name in _holders(services, request.window[-1]):
            await held.enter_async_context(services.lease(vm_id, what=name))
        await held.enter_async_context(services.lease(IMAGES_LOCK, what="the images"))
        if services.records.layer(request.id) is not None:
            return
        window = _window(context)
        if not path.exists():
            files.freeze(temporary, path)
        merged = Layer(
            id=request.id,
            virtual_size=window[-1].virtual_size,
            file_size=allocated(path),
            parent=window[0].parent,
            merged=request.window,
        )
        services.records.put_in_place(merged, of=window[-1].id)
        services.records.add_event("layers.merged", name=request.id, data={"count": len(window)})


def _holders(services: Services, layer: str) -> list[tuple[str, str]]:
    """The locks of whoever stands on the layer itself, in the order in which everybody takes them."""
    records = services.records
    found = {vm.id: vm.name for vm in records.vms() if any(disk.layer == layer for disk in _disks(vm))}
    found |= {node.vm_id: node.vm_name for node in records.snapshots() if layer in node.layer_ids}
    return sorted(found.items())


async def _relink(context: Context[MergeRequest]) -> None:
    services = context.services
    for vm in services.records.vms():
        layers = {layer.id: layer for layer in services.records.layers()}
        stands_on = {layer for disk in _disks(vm) for layer in layer_chain(disk.layer, layers)}
        if context.request.id in stands_on:
            # Its QEMU has the old files open; if it can't change over now, their room comes back when it ends.
            with contextlib.suppress(AtollError):
                await _relink_one(services, vm)
    async with services.lease(IMAGES_LOCK, what="the images"):
        # This operation is unfinished still, but it has read what it kept for that.
        collect(services, dry_run=False, reads_no_more=context.request.id)


async def _relink_one(services: Services, vm: Vm) -> None:
    async with services.lease(vm.id, what=vm.name):
        vm = services.vm(vm.id)
        if observe.phase_of(services, vm) in (Phase.RUNNING, Phase.PAUSED):
            async with control(services, vm) as monitor:
                await relink(monitor, vm, services)


MERGE = Verb(
    name="merge",
    request=MergeRequest,
    steps=(
        Step("check", _check),
        Step("copy", _copy, _remove),
        Step("adopt", _adopt, final=True),
        Step("relink", _relink),
    ),
)


async def _in_background() -> None:
    vm_id, data, cache, run = sys.argv[1:]
    os.nice(10)
    services = Services(Layout(data=Path(data), cache=Path(cache), run=Path(run)))
    try:
        await merge(services=services, vm_id=vm_id)
    finally:
        services.close()


if __name__ == "__main__":
    import asyncio

    with contextlib.suppress(AtollError):
        asyncio.run(_in_background())
