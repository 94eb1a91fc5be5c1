"""Pools: copies of a snapshot that are started already and stand still, so that one more is there in a moment.

take

    step      do                                                   undo
    record    the copy is a VM like any, under the name wanted     back into the pool, under its old name
    go on     let its guest run                                    (point of no return)
"""

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, AtollError, InvalidInput, NotFound, WrongState
from atoll.model.snapshot import Snapshot
from atoll.model.state import Phase
from atoll.model.vm import PoolInfo, Vm
from atoll.operations import networks, observe
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.fork import copies, mount_shares, settle_later
from atoll.operations.guest_settle import rename_word
from atoll.operations.power import go_on
from atoll.operations.remove import remove
from atoll.operations.services import Report, Services

MOST = 100
"""Copies that wait in one pool."""


class TakeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    name: str
    old_name: str
    pool: str


def pools(services: Services) -> list[PoolInfo]:
    """Each snapshot that has copies waiting, and how many."""
    ready: dict[str, list[str]] = {}
    for vm in services.records.vms():
        if vm.pool is not None:
            ready.setdefault(vm.pool, []).append(vm.name)
    nodes = {node.id: node for node in services.records.snapshots()}
    return [
        PoolInfo(
            snapshot_id=snapshot_id,
            name=f"{nodes[snapshot_id].vm_name}@{nodes[snapshot_id].name}" if snapshot_id in nodes else snapshot_id,
            ready=tuple(names),
        )
        for snapshot_id, names in ready.items()
    ]


async def fill(node: Snapshot, ready: int, *, services: Services, report: Report | None = None) -> int:
    """Start copies until `ready` of them wait; returns how many were started. Raises as `fork`."""
    if not 1 <= ready <= MOST:
        raise InvalidInput(f"{ready} copies can't wait", f"a pool has 1 to {MOST}")
    waiting = _waiting(services, node)
    for vm in waiting:
        if observe.phase_of(services, vm) is not Phase.PAUSED:
            # Its process has ended meanwhile: another takes its place.
            await remove(vm, services=services, force=True)
    count = ready - len(_waiting(services, node))
    if count <= 0:
        return 0
    taken = {vm.name for vm in services.records.vms()}
    stem = f"pool-{node.id[:6]}"
    names = [name for number in range(1, MOST + count + 1) if (name := f"{stem}-{number}") not in taken][:count]
    await copies(node, names, services, report, pool=node.id)
    return count


def _waiting(services: Services, node: Snapshot) -> list[Vm]:
    return [vm for vm in services.records.vms() if vm.pool == node.id]


async def take(node: Snapshot, name: str, *, services: Services) -> Vm:
    """Let one of those that wait go on, under this name. Raises `NotFound` when none waits, `AlreadyExists`."""
    for vm in _waiting(services, node):
        request = TakeRequest(vm_id=vm.id, name=name, old_name=vm.name, pool=node.id)
        try:
            await perform(TAKE, request, services=services, subject=vm.id, subject_name=vm.name, lock_timeout=0.0)
        except AlreadyExists:
            raise
        except AtollError:
            # Another command is at it, or its process has ended.
            continue
        taken = services.vm(vm.id)
        settle_later(services, taken)
        await mount_shares(services, [taken])
        return taken
    raise NotFound(
        f"no copy of {node.vm_name}@{node.name} waits",
        next_step=f"Start some: `atoll pool create {node.vm_name}@{node.name} --ready 5`.",
    )


async def empty(snapshot_id: str, *, services: Services) -> int:
    """Remove the copies that wait; returns how many there were."""
    waiting = [vm for vm in services.records.vms() if vm.pool == snapshot_id]
    for vm in waiting:
        await remove(vm, services=services, force=True)
    return len(waiting)


async def _record(context: Context[TakeRequest]) -> None:
    services, vm, request = context.services, context.vm, context.request
    if vm.pool is None and vm.name == request.name:
        return
    if vm.pool is None or observe.phase_of(services, vm) is not Phase.PAUSED:
        raise WrongState(f"{vm.name}: it doesn't wait any more", next_step="Try again.")
    services.records.put_vm(replace(vm, name=request.name, pool=None))
    rename_word(services.layout.vm(vm.id), request.name)


async def _put_back(context: Context[TakeRequest]) -> None:
    vm, request = context.services.records.vm(context.subject), context.request
    if vm is not None and vm.pool is None and vm.name == request.name:
        context.services.records.put_vm(replace(vm, name=request.old_name, pool=request.pool))


async def _go_on(context: Context[TakeRequest]) -> None:
    vm = context.vm
    await networks.tell_names(context.services, networks.shared_by(vm.spec))
    await go_on(context.services, vm)
    context.services.records.add_event("vm.started", vm_id=vm.id, name=vm.name, data={"from": "pool"})


TAKE = Verb(
    name="take",
    request=TakeRequest,
    durable=False,
    steps=(Step("record", _record, _put_back), Step("go on", _go_on, final=True)),
)
