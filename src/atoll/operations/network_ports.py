"""Published ports of cards on networks: the network's uplink has them, not QEMU."""

import contextlib

from atoll.errors import AlreadyExists
from atoll.host import uplink
from atoll.layout import NetworkPaths
from atoll.model.network import Network
from atoll.model.spec import NicSpec, PortSpec
from atoll.operations.check_ports import check_port_free
from atoll.operations.network_troubles import running_cards
from atoll.operations.services import Services


async def publish_all(paths: NetworkPaths, vm_name: str, nic: NicSpec) -> None:
    """Exactly the card's ports, at its start. Those of a run that ended by itself may be there still."""
    assert nic.address is not None
    there = [port for address, port in await uplink.published(paths) if address == nic.address]
    for port in there:
        if port not in nic.ports:
            await uplink.unpublish(paths, nic.address, port)
    for port in nic.ports:
        if port not in there:
            check_port_free(vm_name, port)
            await uplink.publish(paths, nic.address, port)


async def publish_again(services: Services, network: Network) -> None:
    """An uplink that took the place of one that was killed has no ports yet: those of VMs that run, and of those that
    an agent wakes when they are called.
    """
    paths = services.layout.network(network.id)
    if await uplink.published(paths):
        return
    for nic in [nic for _, nic in running_cards(services, network)] + _sleeping_cards(services, network):
        for port in nic.ports:
            # Another program may have taken it.
            with contextlib.suppress(AlreadyExists):
                await uplink.publish(paths, nic.address or "", port)


def _sleeping_cards(services: Services, network: Network) -> list[NicSpec]:
    """Those that an agent listens for. It can't be asked: who connects to a bell is given its networks."""
    return [
        nic
        for vm in services.records.vms()
        if vm.sleeps and services.layout.vm(vm.id).socket("bell").exists()
        for nic in vm.spec.nics
        if nic.network == network.id
    ]


async def unpublish_all(services: Services, nics: tuple[NicSpec, ...]) -> None:
    """What has ended answers on no port."""
    for nic in nics:
        if nic.network and nic.ports:
            for port in nic.ports:
                await forward(services, nic, port, add=False)


async def forward(services: Services, nic: NicSpec, port: PortSpec, *, add: bool) -> str:
    """Publish a port, or take it back; returns what stands against it. On a network that is down there is none."""
    assert nic.network is not None and nic.address is not None
    paths = services.layout.network(nic.network)
    if add:
        try:
            await uplink.publish(paths, nic.address, port)
        except AlreadyExists as error:
            return error.why
        except OSError as error:
            return f"the network's uplink doesn't answer ({error})"
        return ""
    with contextlib.suppress(OSError):
        await uplink.unpublish(paths, nic.address, port)
    return ""
