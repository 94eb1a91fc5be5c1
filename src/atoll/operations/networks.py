"""Networks as operations on VMs need them: addresses for cards, taps for a QEMU that starts, names after a change."""

import contextlib
import os
from collections.abc import AsyncIterator, Container, Iterable, Sequence

from msgspec.structs import replace

from atoll.errors import AtollError, InvalidInput, NotFound
from atoll.model.names import find
from atoll.model.network import Attached, Members, Network, NetworkInfo
from atoll.model.spec import NOWHERE, NicSpec, VmSpec
from atoll.model.vm import Vm
from atoll.operations.services import Services
from atoll.qemu.devices import network_descriptor

# What touches the kernel is imported where it is used: most VMs are on no network that they share.


def find_network(services: Services, reference: str) -> Network:
    """By name, id, or unique prefix of either. Raises `NotFound`."""
    return find(reference, services.records.networks(), "network")


def network_of(services: Services, network_id: str) -> Network:
    network = services.records.network(network_id)
    if network is None:
        raise NotFound("the network is gone", "it was removed", "`atoll net ls` lists those that there are.")
    return network


def list_networks(services: Services) -> list[NetworkInfo]:
    attached = services.records.attached()
    return [_observed(services, network, attached.get(network.id, ())) for network in services.records.networks()]


def _observed(services: Services, network: Network, attached: Sequence[Attached]) -> NetworkInfo:
    from atoll.host.host_bridge import is_there
    from atoll.host.network import impairments, is_up

    paths = services.layout.network(network.id)
    up = is_there(network.bridge) if network.mode == "bridge" else is_up(paths)
    wrong = tuple(impairments(paths)) if up else ()
    return NetworkInfo(network=network, up=up, attached=tuple(attached), impairments=wrong)


def members_of(services: Services, network: Network) -> Members:
    attached = services.records.attached(network.id).get(network.id, ())
    return Members(network=network, attached=tuple(attached), groups=tuple(services.records.groups()))


def check_groups(services: Services, names: Iterable[str]) -> None:
    """Raises `NotFound` for one that isn't there."""
    there = {group.name for group in services.records.groups()}
    for name in names:
        if name not in there:
            raise NotFound(f"there is no security group '{name}'", next_step="`atoll net group ls` lists them.")


def lock_of(network_id: str) -> str:
    """Held while addresses are chosen and while the network is changed on this computer: never for long."""
    return f"network-{network_id}"


def shared_by(*specs: VmSpec | None) -> list[str]:
    """The ids of the networks that a machine has cards on, sorted."""
    return sorted({nic.network for spec in specs if spec is not None for nic in spec.nics if nic.network})


@contextlib.asynccontextmanager
async def locked(services: Services, network_ids: Iterable[str]) -> AsyncIterator[None]:
    """In the order of the ids, so that two of us never wait for each other."""
    async with contextlib.AsyncExitStack() as stack:
        for each in sorted(network_ids):
            await stack.enter_async_context(services.lease(lock_of(each), what="the network"))
        yield


@contextlib.asynccontextmanager
async def addressed(services: Services, vm: Vm) -> AsyncIterator[Vm]:
    """The VM with an address for each of its cards on a network; to be recorded before this is left.

    Raises `NotFound` when a network is gone, `AlreadyExists` when one is full.
    """
    from atoll.model.subnets import free_address

    async with locked(services, shared_by(vm.spec)):
        nics = []
        for nic in vm.spec.nics:
            if nic.network and nic.address is None and network_of(services, nic.network).mode != "bridge":
                taken = {each.address for each in services.records.attached(nic.network).get(nic.network, ())}
                taken |= {other.address for other in vm.spec.nics if other.address and other.network == nic.network}
                nic = replace(nic, address=free_address(network_of(services, nic.network), taken))
            nics.append(nic)
        yield replace(vm, spec=replace(vm.spec, nics=tuple(nics)))


def alone(nic: NicSpec) -> NicSpec:
    """The card of a machine from elsewhere or from before, whose network isn't here: it leads nowhere.

    A machine may depend on being kept in, so it doesn't get a way out instead. It is a tap still: memory that was saved
    with one goes on with nothing else.
    """
    if nic.network is None:
        return nic
    return replace(nic, network=NOWHERE, address=None, ports=(), groups=(), limit=0)


def still_here(services: Services, nics: Iterable[NicSpec]) -> tuple[NicSpec, ...]:
    """The cards, those of removed networks alone."""
    here = {network.id for network in services.records.networks()}
    return tuple(nic if nic.network in here else alone(nic) for nic in nics)


@contextlib.asynccontextmanager
async def taps(services: Services, vm: Vm, spec: VmSpec, *, had: Container[str] = ()) -> AsyncIterator[dict[str, int]]:
    """Open taps for the machine's cards on networks, by descriptor's name; they are closed here when this is left.
    Those that the caller had are left out.

    The networks are brought up where they aren't, and the published ports with them. Raises `NetworkFailed`,
    `AlreadyExists` (a port).
    """
    given: dict[str, int] = {}
    try:
        for nic in spec.nics:
            if nic.network is not None and network_descriptor(nic) not in had:
                given[network_descriptor(nic)] = await tap_for(services, vm, nic)
        yield given
    finally:
        for descriptor in given.values():
            os.close(descriptor)


async def tap_for(services: Services, vm: Vm, nic: NicSpec) -> int:
    """A tap for one card: a descriptor that the caller closes."""
    from atoll.host import host_bridge
    from atoll.host import network as world
    from atoll.host.namespace import open_tap
    from atoll.operations import network_ports

    if nic.network == NOWHERE:
        return open_tap(None, "alone")
    assert nic.network is not None
    async with locked(services, [nic.network]):
        network = network_of(services, nic.network)
        members = members_of(services, network)
        if network.mode == "bridge":
            return await host_bridge.add_tap(members, nic.mac, nic.address or "")
        assert nic.address is not None
        paths = services.layout.network(network.id)
        holder = await up(services, network)
        if network.mode == "nat":
            await network_ports.publish_all(paths, vm.name, nic)
        return await world.add_tap(holder, paths, members_of(services, network), mac=nic.mac, address=nic.address)


async def up(services: Services, network: Network) -> int:
    """Bring a network up where it isn't, with the ports of VMs that run; returns its holder's pid. The caller holds its
    lock. Raises `NetworkFailed`, `MissingTool`.
    """
    from atoll.host import network as world
    from atoll.operations import network_ports

    paths = services.layout.network(network.id)
    holder = await world.ensure(members_of(services, network), paths)
    if network.mode == "nat":
        await network_ports.publish_again(services, network)
    return holder


def card_of(
    services: Services, vm: Vm, *, network: str | None = None, name: str | None = None, shared: bool = False
) -> NicSpec:
    """The one that is meant: by its network, by its name, else the only one. Raises `NotFound`, `InvalidInput`."""
    wanted = None if network is None else find_network(services, network).id
    on = [nic for nic in vm.spec.nics if nic.network != NOWHERE and (nic.network or not shared)]
    found = [nic for nic in on if wanted in (None, nic.network) and name in (None, nic.name)]
    if not found:
        what = f"has no card '{name}'" if name else "isn't on that network" if on else "isn't on a network"
        raise NotFound(f"{vm.name} {what}", next_step=f"`atoll show {vm.name}` tells its cards.")
    if len(found) > 1:
        what = "on" if shared else "connected to"
        raise InvalidInput(f"{vm.name} is {what} {len(found)} networks", next_step="Say which with --network.")
    return found[0]


async def tell_names(services: Services, network_ids: Iterable[str]) -> None:
    """After VMs came, went or were renamed, or rules were changed: let the networks that are up know."""
    ids = sorted(set(network_ids))
    if not ids:
        return
    from atoll.host import network as world

    for each in ids:
        async with locked(services, [each]):
            network = services.records.network(each)
            if network is not None and network.mode != "bridge":
                await world.tell(members_of(services, network), services.layout.network(each))
    await mend_bridges(services, ids)


async def mend_left(services: Services) -> None:
    """After VMs have ended by themselves. Where it can't be done, the next that starts or ends there does it."""
    left, services.bridges_left = services.bridges_left, set()
    with contextlib.suppress(AtollError):
        await mend_bridges(services, left)


async def mend_bridges(services: Services, network_ids: Iterable[str]) -> None:
    """After taps have gone, or rules were changed: this computer's own bridges have the rules that shall hold."""
    for each in network_ids:
        network = services.records.network(each)
        if network is not None and network.mode == "bridge":
            from atoll.host import host_bridge

            async with locked(services, [each]):
                await host_bridge.mend(members_of(services, network))
