"""history: the snapshots of a VM as a tree, with what each takes; and forgetting them."""

from atoll.model.snapshot import HistoryNode, Snapshot
from atoll.model.vm import Vm
from atoll.operations.collect import collect
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.heads import allocated
from atoll.operations.services import Services
from atoll.qemu.plan import layer_chain


def history(vm: Vm, *, services: Services) -> list[HistoryNode]:
    """The VM's snapshots, oldest first."""
    layout, records = services.layout, services.records
    layers = {layer.id: layer for layer in records.layers()}
    standing: dict[str, list[str]] = {}
    for each in records.vms():
        if each.snapshot is not None:
            standing.setdefault(each.snapshot, []).append(each.name)
    nodes = []
    for snapshot in records.snapshots(vm.id):
        own = sum(allocated(layout.layer(layer)) for layer in snapshot.layer_ids)
        chains = [layer_chain(layers[layer].parent, layers) for layer in snapshot.layer_ids if layer in layers]
        shared = sum(allocated(layout.layer(layer)) for chain in chains for layer in chain)
        own += snapshot.memory.file_size if snapshot.memory is not None else 0
        heads = tuple(standing.get(snapshot.id, ()))
        nodes.append(HistoryNode(snapshot=snapshot, own=own, shared=shared, heads=heads))
    return nodes


async def forget(vm: Vm, node: Snapshot, *, services: Services) -> None:
    """Take a snapshot out of the history. What stands on it keeps its data; its memory, and layers that nothing else
    needs, are removed.
    """
    async with services.lease(vm.id, what=vm.name), services.lease(IMAGES_LOCK, what="the images"):
        services.records.remove_snapshot(node.id)
        services.records.add_event("vm.forgot", vm_id=vm.id, name=vm.name, data={"snapshot": node.name, "id": node.id})
        collect(services, dry_run=False)
