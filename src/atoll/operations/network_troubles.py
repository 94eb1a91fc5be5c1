"""What a network lacks that VMs on it need, since a helper has ended. Observed; each sentence says what mends it."""

from collections.abc import Sequence

from atoll.host import facts, namespace, slirp
from atoll.host.link_text import TAP, Link, ports_of
from atoll.host.network import look
from atoll.model.network import Network
from atoll.model.spec import NicSpec
from atoll.operations.services import Services


async def troubles(services: Services, network: Network) -> tuple[str, ...]:
    """A sentence for each."""
    if network.mode == "bridge":
        return ()
    paths = services.layout.network(network.id)
    cards = running_cards(services, network)
    holder = namespace.holder_of(paths)
    if holder is None:
        return tuple(f"{vm} runs without it: `atoll restart {vm}` brings it up" for vm, _ in cards)
    links, _ = await look(holder.pid)
    found = [_without_cable(vm, nic, links) for vm, nic in cards]
    if network.mode == "nat" and slirp.listener(paths.uplink) is None:
        found.append(
            "its way out has ended, and published ports don't answer: they are back when a VM on it starts, "
            f"or with `atoll net exec {network.name} true`"
        )
    return tuple(each for each in found if each)


def running_cards(services: Services, network: Network) -> list[tuple[str, NicSpec]]:
    """With the names of their VMs."""
    return [
        (vm.name, nic)
        for vm in services.records.vms()
        if vm.run is not None and facts.is_alive(vm.run)
        for nic in vm.spec.nics
        if nic.network == network.id
    ]


def _without_cable(vm: str, nic: NicSpec, links: Sequence[Link]) -> str:
    if any(port.mac == nic.mac for port in ports_of(links)):
        return ""
    if any(link.mac == nic.mac and link.name.startswith(TAP) for link in links):
        return f"the relay of {vm}'s cable has ended, and nothing passes: the next `atoll net impair {vm}` mends it"
    return f"{vm} has no cable: `atoll restart {vm}` gives it one"
