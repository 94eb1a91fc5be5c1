"""Cards on networks: what the user asked for, made into specs. Pure, but for chance."""

from collections.abc import Sequence

from msgspec.structs import replace

from atoll.errors import AlreadyExists, InvalidInput
from atoll.model import groups, subnets
from atoll.model.names import find
from atoll.model.network import Network
from atoll.model.requests import CreateRequest, NicRequest
from atoll.model.spec import NicSpec, VmSpec
from atoll.operations.resolve import new_mac
from atoll.qemu import devices

OWN = "user"
SLOWEST, FASTEST = 8_000, 125_000_000_000
"""Bytes a second. Slower ones let no large packet through."""


def with_nics(spec: VmSpec, request: CreateRequest, networks: Sequence[Network]) -> VmSpec:
    """The machine with the cards that the request lists. Raises `InvalidInput`, `NotFound`, `AlreadyExists`."""
    if request.network == "none":
        raise InvalidInput("a VM with network cards can't be without a network", next_step="Leave `none` away.")
    nics: list[NicSpec] = []
    for wanted in request.nics:
        # The options that are meant for one card hold for the first.
        mac = wanted.mac or (request.mac if not nics else None)
        nic = card(replace(wanted, mac=mac), networks, nics)
        restrict = request.restrict_network and nic.network is None
        nics.append(replace(nic, model=request.nic_model or "virtio", restrict=restrict))
    if request.ports:
        index = _publishing(nics, networks)
        nics[index] = replace(nics[index], ports=request.ports)
    spec = replace(spec, nics=tuple(nics))
    return replace(spec, addresses=devices.assign_addresses(spec))


def card(request: NicRequest, networks: Sequence[Network], there: Sequence[NicSpec]) -> NicSpec:
    """A further card. Raises `InvalidInput`, `NotFound`, `AlreadyExists` for a second one on a network."""
    mac = new_mac() if request.mac is None else subnets.check_mac(request.mac)
    number = 0
    while any(nic.name == f"net{number}" for nic in there):
        number += 1
    if request.network == OWN:
        if request.address is not None:
            raise InvalidInput("a network of its own takes no address", next_step="Name a network, or leave it away.")
        if request.groups or request.limit:
            raise InvalidInput(
                "a network of its own has no groups and no limit",
                "they are for networks that VMs share",
                "Make one with `atoll net create`.",
            )
        return NicSpec(name=f"net{number}", mac=mac)
    network = find(request.network, networks, "network")
    if any(nic.network == network.id for nic in there):
        raise AlreadyExists(f"it is on the network '{network.name}' already", "a VM has one card on each")
    address = None if request.address is None else subnets.check_address(network, request.address)
    return NicSpec(
        name=f"net{number}", mac=mac, network=network.id, address=address,
        groups=check_groups(request.groups), limit=check_limit(request.limit),
    )  # fmt: skip


def check_groups(names: Sequence[str]) -> tuple[str, ...]:
    """Each once. Raises `InvalidInput`."""
    return tuple(dict.fromkeys(groups.check_name(name) for name in names))


def check_limit(limit: int) -> int:
    """Bytes a second that a card can be held to; 0 for no limit. Raises `InvalidInput`."""
    if limit and not SLOWEST <= limit <= FASTEST:
        raise InvalidInput("no card can have that limit", "it is from 64kbit to 1000Gbit", "Write it like 10Mbit.")
    return limit


def _publishing(nics: Sequence[NicSpec], networks: Sequence[Network]) -> int:
    """The first card whose ports can be published. Raises `InvalidInput`."""
    leading_out = {network.id for network in networks if network.mode == "nat"}
    for index, nic in enumerate(nics):
        if nic.network is None or nic.network in leading_out:
            return index
    raise InvalidInput(
        "ports can't be published",
        "private networks have no way in, and on a bridge a VM is reached by its own address",
        "Give it a card on a network of mode nat, or `--network user`, as well.",
    )
