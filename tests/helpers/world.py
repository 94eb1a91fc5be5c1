"""Whether what is recorded and what is there agree: processes, files, disks that QEMU has open, forwarded ports."""

from collections.abc import Iterable
from pathlib import Path

from atoll.host import facts, namespace, user_network
from atoll.host.link_text import ports_of
from atoll.host.network import look
from atoll.host.sockets import connect
from atoll.layout import Layout
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.boot import engines_of
from atoll.operations.collect import needed
from atoll.operations.networks import list_networks
from atoll.operations.services import Services
from atoll.qemu import devices
from atoll.qemu.monitor import Monitor


async def disagreements(layout: Layout) -> list[str]:
    """A sentence for each thing that is recorded and not there, or there and not recorded."""
    services = Services(layout)
    try:
        found = [f"unfinished: {operation}" for operation in services.records.operations(unfinished=True)]
        vms = services.records.vms()
        found += _of_folders(layout, vms)
        found += _of_images(layout, services)
        found += await _of_networks(layout, services)
        for vm in vms:
            found += _of_files(layout, vm)
            found += await _of_process(services, vm)
        return found
    finally:
        services.close()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _compared(what: str, there: Iterable[str], recorded: Iterable[str]) -> list[str]:
    there, recorded = set(there), set(recorded)
    found = [f"{what} {name} is there and not recorded" for name in sorted(there - recorded)]
    return found + [f"{what} {name} is recorded and not there" for name in sorted(recorded - there)]


def _of_folders(layout: Layout, vms: list[Vm]) -> list[str]:
    found = _compared("VM folder", _names(layout.vms), {vm.id for vm in vms})
    found += [f"temporary {name}" for name in sorted(_names(layout.temporary))]
    sockets = _names(layout.run / "vms") - {vm.id for vm in vms}
    return found + [f"sockets of a VM that is gone: {name}" for name in sorted(sockets)]


def _of_images(layout: Layout, services: Services) -> list[str]:
    blobs = {blob for image in services.records.images() for blob in image.blob_ids}
    blobs |= needed(services).blobs
    recorded = {f"{layer.id}.qcow2" for layer in services.records.layers()}
    return _compared("layer", _names(layout.layers), recorded) + _compared("blob", _names(layout.blobs), blobs)


async def _of_networks(layout: Layout, services: Services) -> list[str]:
    """Folders and processes of networks that are gone; taps of cards that aren't recorded, and the other way round."""
    networks = {network.id for network in services.records.networks()}
    found = [f"files of a network that is gone: {name}" for name in sorted(_names(layout.run / "networks") - networks)]
    for info in list_networks(services):
        holder = namespace.holder_of(layout.network(info.network.id))
        if holder is None:
            continue
        running = {vm.id for vm in services.records.vms() if vm.run is not None and facts.is_alive(vm.run)}
        recorded = {card.address for card in info.attached if card.vm_id in running}
        there = {port.address for port in ports_of((await look(holder.pid))[0])}
        found += _compared(f"{info.network.name}: tap for", there, recorded)
    return found


def _of_files(layout: Layout, vm: Vm) -> list[str]:
    paths = layout.vm(vm.id)
    heads = {paths.head(disk).name for spec in (vm.spec, vm.pending) if spec for disk in spec.disks if not disk.blob}
    there = {name for name in _names(layout.vm(vm.id).home) if name.endswith((".qcow2", ".tmp"))}
    return _compared(f"{vm.name}: disk file", there, heads)


async def _of_process(services: Services, vm: Vm) -> list[str]:
    phase = observe.phase_of(services, vm)
    there = {str(pid) for pid in engines_of(vm)}
    recorded = {str(vm.run.pid)} if vm.run is not None and phase is not Phase.STOPPED else set()
    found = _compared(f"{vm.name}: QEMU", there, recorded)
    if phase in (Phase.RUNNING, Phase.PAUSED) and not found:
        async with Monitor(connect(services.layout.vm(vm.id).socket("control"))) as monitor:
            found = await _of_devices(vm, monitor)
        return found + _of_ports(services.layout, vm)
    return found


async def _of_devices(vm: Vm, monitor: Monitor) -> list[str]:
    blocks = await monitor.execute("query-block")
    disks = {block["inserted"]["node-name"] for block in blocks if block.get("inserted")} - {
        "seed-iso",
        "firmware",
        "variables",
    }
    ports = {each["label"] for each in await monitor.execute("query-chardev") if each["label"].startswith("share")}
    cards = {each["name"] for each in await monitor.execute("query-rx-filter")}
    return [
        *_compared(f"{vm.name}: plugged disk", disks, {devices.head_node(disk) for disk in vm.spec.disks}),
        *_compared(f"{vm.name}: port of a share", ports, {devices.share_name(each) for each in vm.spec.shares}),
        *_compared(f"{vm.name}: card", cards, {f"nic-{nic.name}" for nic in vm.spec.nics}),
    ]


def _of_ports(layout: Layout, vm: Vm) -> list[str]:
    found = []
    for nic in vm.spec.nics:
        if nic.network is not None:
            continue
        there = {str(port) for port in user_network.published(layout.vm(vm.id).network_control(nic.name))}
        found += _compared(f"{vm.name}: published port", there, {str(port) for port in nic.ports})
    return found
