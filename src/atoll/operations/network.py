"""net create, net rm

create   record (undo: take it away) ─ tell
rm       check ─ forget (undo: record it again) ─ end (point of no return): processes, the namespace, files

A network comes up when the first VM on it starts, and again after a reboot.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from atoll.errors import InvalidInput, Unsupported, WrongState
from atoll.host import kernel, process
from atoll.model import subnets
from atoll.model.names import new_id
from atoll.model.network import Mode, Network
from atoll.model.requests import NetworkRequest
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.networks import locked
from atoll.operations.services import Services

TOOLS: dict[Mode, tuple[str, ...]] = {
    "private": ("unshare", "nsenter", "setpriv", "ip", "nft", "dnsmasq"),
    "bridge": ("ip", "nft"),
    "nat": ("unshare", "nsenter", "setpriv", "ip", "nft", "dnsmasq", "slirp4netns"),
}


class RemoveNetworkRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    network: Network


async def create(request: NetworkRequest, *, services: Services) -> Network:
    """Raises `InvalidInput`, `AlreadyExists`, `MissingTool`, `Unsupported` where namespaces are refused."""
    subnets.check_name(request.name)
    _check_bridge(request)
    _check_host(request.mode)
    if request.mode == "bridge":
        network = await _of_bridge(request)
    else:
        network = _own(request, [each.subnet for each in services.records.networks() if each.subnet])
    await perform(CREATE, network, services=services, subject=network.id, subject_name=network.name)
    return network


def _check_bridge(request: NetworkRequest) -> None:
    if (request.mode == "bridge") is not bool(request.bridge):
        raise InvalidInput(
            "a bridge belongs to the mode bridge, and that needs one",
            next_step="Write it like --mode bridge --bridge br0, or leave both away.",
        )
    if request.mode != "bridge":
        return
    if request.subnet is not None or request.dns_domain is not None or request.ipv6:
        raise InvalidInput(
            "a network of mode bridge has neither a subnet nor a domain of its own",
            "addresses and names come from the network behind the bridge",
            "Leave --subnet, --ipv6 and --dns-domain away.",
        )
    if os.geteuid() != 0:
        raise Unsupported(
            "networks of mode bridge are root's",
            "an ordinary user may put nothing on this computer's bridges",
            "Use sudo; or mode nat, with published ports.",
        )


async def _of_bridge(request: NetworkRequest) -> Network:
    from atoll.host import host_bridge

    assert request.bridge is not None
    await host_bridge.check(request.bridge)
    return Network(
        id=new_id(),
        name=request.name,
        mode="bridge",
        bridge=request.bridge,
        subnet="",
        gateway="",
        domain="",
        created_at=time.time(),
    )


def _own(request: NetworkRequest, others: Sequence[str]) -> Network:
    if request.subnet is not None:
        subnet = subnets.check_subnet(request.subnet)
        if request.mode == "nat" and (hidden := subnets.overlapped(subnet, host_routes())):
            raise InvalidInput(f"the subnet {subnet} can't be", f"this computer reaches {hidden}", "Choose another.")
    else:
        subnet = subnets.free_subnet([*others, *host_routes()])
    if request.ipv6 and not Path("/proc/sys/net/ipv6").exists():
        raise Unsupported("the network can't have IPv6", "this computer's kernel has none", "Leave --ipv6 away.")
    domain = subnets.check_domain(request.dns_domain or f"{request.name}.{subnets.OWN_DOMAIN}")
    return Network(
        id=new_id(),
        name=request.name,
        mode=request.mode,
        subnet=subnet,
        gateway=subnets.gateway_of(subnet),
        domain=domain,
        created_at=time.time(),
        subnet6=subnets.new_subnet6() if request.ipv6 else None,
    )


def _check_host(mode: Mode) -> None:
    for tool in TOOLS[mode]:
        process.find(tool)
    needed = [(kernel.tun(), "network taps")]
    if mode != "bridge":
        needed = [(kernel.user_namespaces(), "user namespaces"), *needed]
    for feature, what in needed:
        if not feature.usable:
            raise Unsupported(f"networks need {what}", feature.why, "`atoll doctor` tells what can be done.")


def host_routes() -> list[str]:
    """The subnets that this computer reaches without its default route."""
    found = []
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        _, destination, *_, mask, _, _, _ = line.split()
        bits = int(mask, 16).bit_count()
        if bits:
            number = int.from_bytes(int(destination, 16).to_bytes(4, "little"), "big")
            found.append(f"{'.'.join(str(number >> shift & 0xFF) for shift in (24, 16, 8, 0))}/{bits}")
    return found


async def remove(network: Network, *, services: Services, force: bool = False) -> None:
    """Raises `WrongState` while VMs have cards on it, unless `force` takes those away."""
    from atoll.operations.network_nics import detach

    if force:
        for each in services.records.attached(network.id).get(network.id, ()):
            await detach(services.vm(each.vm_id), network, services=services, now=True)
    request = RemoveNetworkRequest(network=network)
    await perform(REMOVE, request, services=services, subject=network.id, subject_name=network.name)


async def _record(context: Context[Network]) -> None:
    if context.services.records.network(context.subject) is None:
        context.services.records.add_network(context.request)


async def _unrecord(context: Context[Network]) -> None:
    if context.services.records.network(context.subject) is not None:
        context.services.records.remove_network(context.subject)


async def _tell(context: Context[Network]) -> None:
    network = context.request
    data = {"mode": network.mode, "subnet": network.subnet, "bridge": network.bridge}
    context.services.records.add_event("network.created", name=network.name, data=data)


async def _check_unused(context: Context[RemoveNetworkRequest]) -> None:
    network = context.services.records.network(context.subject)
    attached = context.services.records.attached(context.subject).get(context.subject, ())
    if network is not None and attached:
        raise WrongState(
            f"the network '{network.name}' is in use",
            f"{', '.join(each.vm for each in attached)} {'is' if len(attached) == 1 else 'are'} on it",
            "Detach them with `atoll net detach`, or use --force.",
        )


async def _forget(context: Context[RemoveNetworkRequest]) -> None:
    context.services.records.remove_network(context.subject)


async def _record_again(context: Context[RemoveNetworkRequest]) -> None:
    if context.services.records.network(context.subject) is None:
        context.services.records.add_network(context.request.network)


async def _end(context: Context[RemoveNetworkRequest]) -> None:
    from atoll.host import host_bridge
    from atoll.host import network as world

    async with locked(context.services, [context.subject]):
        if context.request.network.mode == "bridge":
            await host_bridge.end(context.request.network)
        else:
            world.end(context.subject, context.services.layout.network(context.subject))
    context.services.records.add_event("network.removed", name=context.request.network.name)
    for lock in (context.subject, f"network-{context.subject}"):
        context.services.layout.vm_lock(lock).unlink(missing_ok=True)


CREATE = Verb(name="net create", request=Network, steps=(Step("record", _record, _unrecord), Step("tell", _tell)))
REMOVE = Verb(
    name="net rm",
    request=RemoveNetworkRequest,
    steps=(Step("check", _check_unused), Step("forget", _forget, _record_again), Step("end", _end, final=True)),
)
