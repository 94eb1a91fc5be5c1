"""The block nodes of a QEMU that runs: what a disk stands on there, and putting it on what is recorded."""

from typing import Any

from atoll.model.spec import DiskSpec
from atoll.model.vm import Vm
from atoll.operations.descriptors import add_nodes
from atoll.operations.services import Services
from atoll.qemu import devices
from atoll.qemu.monitor import Monitor
from atoll.qemu.plan import HandOver, layer_chain, layer_nodes


async def nodes_below(monitor: Monitor, head: str) -> list[str]:
    """The format nodes that a node stands on in QEMU, the uppermost first; records may have changed since its start."""
    graph: dict[str, Any] = await monitor.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    backing = {
        names[edge["parent"]]: names[edge["child"]]
        for edge in graph["edges"]
        if edge["name"] == "backing" and edge["parent"] in names
    }
    found: list[str] = []
    node = head
    while (node := backing.get(node, "")) and node not in found:
        found.append(node)
    return found


async def close_nodes(monitor: Monitor, names: list[str]) -> None:
    """Close format nodes that nothing uses any more, the uppermost first, and their files. What isn't there is fine."""
    nodes: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {"flat": True})
    there = {node["node-name"] for node in nodes}
    for name in names:
        for node in (name, devices.file_node_name(name)):
            if node in there:
                await monitor.execute("blockdev-del", {"node-name": node})


async def relink(monitor: Monitor, vm: Vm, services: Services) -> None:
    """Put the disks of a VM that runs on the layers that are recorded: they have the same content as those it has open.

    Raises `EngineFailed` when this QEMU can't change over; it goes on with what it has.
    """
    for disk in vm.spec.disks:
        if disk.layer is not None and disk.blob is None:
            await _relink_disk(monitor, disk, services)


async def _relink_disk(monitor: Monitor, disk: DiskSpec, services: Services) -> None:
    layers = {layer.id: layer for layer in services.records.layers()}
    chain = layer_chain(disk.layer, layers)
    wanted = [devices.node_name(disk.name, layer) for layer in reversed(chain)]
    present = await nodes_below(monitor, devices.head_node(disk))
    same = 0
    while same < min(len(wanted), len(present)) and wanted[same] == present[same]:
        same += 1
    if wanted == present:
        return

    def missing(number: HandOver) -> list[dict[str, Any]]:
        nodes: list[dict[str, Any]] = []
        below: str | None = None
        for layer in chain:
            name = devices.node_name(disk.name, layer)
            if name not in present:
                path = services.layout.layer(layer)
                nodes += layer_nodes(name, path, "qcow2", number, read_only=True, backing=below)
            below = name
        return nodes

    await add_nodes(monitor, missing)
    upper = present[same - 1] if same else devices.head_node(disk)
    backing = wanted[same] if wanted[same:] else None
    file = devices.file_node_name(upper)
    reopened = devices.format_node(upper, "qcow2", file, read_only=same > 0, backing=backing)
    await monitor.execute("blockdev-reopen", {"options": [reopened]})
    await close_nodes(monitor, [name for name in present if name not in wanted])
