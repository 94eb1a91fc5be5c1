"""clone: a further VM on the layers of a snapshot, or of the present of a VM.

A clone of a snapshot is `create` on other layers. Of a VM's present, the VM is cut first:

    step      do                                              undo
    check     phase, and disks as they were
    heads     an empty new head for each disk                 remove those that aren't used
    cut       put the VM on its new heads, freeze the old     finish the cut, if QEMU has made it
"""

import contextlib
import time
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from atoll.errors import DisksChanged, NotFound
from atoll.model.names import check_vm_name, new_id
from atoll.model.snapshot import Snapshot
from atoll.model.spec import VmSpec
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import capture, merge, networks, resolve, resolve_disks
from atoll.operations.create import CREATE, NewVm
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.restore import find_snapshot
from atoll.operations.services import Report, Services
from atoll.operations.snapshot import frozen


class CutRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    heads: dict[str, str]
    expected: dict[str, str] = field(default_factory=dict)
    """The heads that are to become layers, by the disk's name; any when empty."""
    nvram: str = ""
    """The name of a temporary file for the UEFI variables of that instant."""
    quiesce: bool = False


def find_source(reference: str, services: Services) -> Vm | Snapshot:
    """A VM, or a snapshot as `VM@SNAPSHOT` or by its id. Raises `NotFound`, `InvalidInput`."""
    vm, at, snapshot = reference.partition("@")
    if at:
        return find_snapshot(services, services.find_vm(vm), snapshot)
    try:
        return services.find_vm(reference)
    except NotFound as unknown:
        fitting = [node for node in services.records.snapshots() if reference and node.id.startswith(reference)]
        if len(fitting) != 1:
            raise unknown from None
        return fitting[0]


async def clone(
    source: Vm | Snapshot, name: str | None, *, services: Services, full: bool = False, report: Report | None = None
) -> Vm:
    """A stopped VM with the disks of `source`, and an identity of its own. With `full` it shares no layer.

    A running VM is cloned as if its power had failed at this instant. Raises `AlreadyExists` (name), `WrongState`.
    """
    if name is not None:
        check_vm_name(name)
    nvram: str | None = None
    if isinstance(source, Vm):
        spec, image, below = await present(source, services, report), source.image, source.snapshot
        nvram = _variables_of(services, source)
    else:
        spec, image, below, nvram = source.spec, source.image, source.id, source.nvram
    vm = Vm(
        id=new_id(),
        name=name or resolve.made_up_name({each.name for each in services.records.vms()}),
        image=image,
        created_at=time.time(),
        spec=own(replace(spec, nics=networks.still_here(services, spec.nics)), full=full),
        snapshot=below,
    )
    copies = {disk.name: disk.layer for disk in spec.disks if disk.layer and disk.blob is None} if full else {}
    request = NewVm(vm=vm, nvram=nvram, copies=copies, copy=True)
    await perform(CREATE, request, services=services, subject=vm.id, subject_name=vm.name, report=report)
    return services.vm(vm.id)


def own(spec: VmSpec, *, full: bool = False) -> VmSpec:
    """The machine with heads and network addresses of its own; published ports stay with who has them."""
    nics = tuple(replace(nic, mac=resolve.new_mac(), ports=(), address=None) for nic in spec.nics)
    disks = resolve_disks.with_heads(resolve_disks.without_heads(spec.disks))
    if full:
        disks = tuple(replace(disk, layer=None) for disk in disks)
    return replace(spec, nics=nics, disks=disks)


async def present(vm: Vm, services: Services, report: Report | None) -> VmSpec:
    """The VM's disks as layers: as they are at this instant. Raises `WrongState`, `Busy`."""
    request = CutRequest(vm_id=vm.id, heads=capture.new_heads(services, vm))
    await perform(CUT, request, services=services, subject=vm.id, subject_name=vm.name, report=report)
    merge.begin(services, vm.id)
    return services.vm(vm.id).spec


def _variables_of(services: Services, vm: Vm) -> str | None:
    """The VM's UEFI variables as a blob of its own kind: they are small, and shared by content."""
    from atoll.host import files

    paths, layout = services.layout.vm(vm.id), services.layout
    if not paths.nvram.exists():
        return None
    sha256 = files.sha256_of(paths.nvram)
    blob = layout.blob(sha256)
    if not blob.exists():
        files.make_folder(layout.blobs)
        files.write_atomically(blob, paths.nvram.read_bytes(), mode=0o444)
    return sha256


async def _check(context: Context[CutRequest]) -> None:
    request = context.request
    capture.check(context, request.heads)
    heads = {disk.name: disk.head for disk in context.vm.spec.disks if disk.head}
    if request.expected and heads != request.expected:
        raise DisksChanged(f"{context.vm.name}: its disks have just been changed", next_step="Try again.")


def _variables(context: Context[CutRequest]) -> Path | None:
    name = context.request.nvram
    return context.services.layout.temporary / name if name else None


async def _make_heads(context: Context[CutRequest]) -> None:
    await capture.make_heads(context, context.request.heads)


async def _remove_heads(context: Context[CutRequest]) -> None:
    capture.remove_heads(context, context.request.heads)


async def _cut(context: Context[CutRequest]) -> None:
    request = context.request
    wanted = capture.Cut(heads=request.heads, nvram=_variables(context))
    quiet = request.quiesce and context.notes["phase"] == Phase.RUNNING
    async with frozen(context) if quiet else contextlib.nullcontext():
        await capture.cut(context, wanted)


async def _finish_cut(context: Context[CutRequest]) -> None:
    await capture.finish_cut(context, context.request.heads)
    variables = _variables(context)
    if variables is not None:
        variables.unlink(missing_ok=True)


CUT = Verb(
    name="cut",
    request=CutRequest,
    steps=(
        Step("check", _check),
        Step("heads", _make_heads, _remove_heads),
        Step("cut", _cut, _finish_cut),
    ),
)
