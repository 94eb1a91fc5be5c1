"""publish, unpublish

publish     check ─ record (reserve the port; undo: the old record) ─ forward (undo: no forward)
unpublish   no forward (undo: forward) ─ record             (point of no return)
"""

import contextlib
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, AtollError, NotFound, Unsupported
from atoll.host import user_network
from atoll.model.spec import NicSpec, PortSpec, Protocol, VmSpec
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.operations import network_ports, observe, resolve
from atoll.operations.check_ports import check_port_free
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.services import Services


class PortRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    nic: str
    port: PortSpec


async def publish(vm: Vm, port: PortSpec, *, services: Services) -> PortSpec:
    """Publish a guest's port now. Raises `AlreadyExists` (with who has it), `Unsupported` without a network."""
    resolve.check_port(port)
    request = PortRequest(vm_id=vm.id, nic=_publishing(vm, services).name, port=port)
    await perform(PUBLISH, request, services=services, subject=vm.id, subject_name=vm.name)
    return port


def _publishing(vm: Vm, services: Services) -> NicSpec:
    """The first card whose ports can be published. Raises `Unsupported`."""
    leading_out = {network.id for network in services.records.networks() if network.mode == "nat"}
    for nic in vm.spec.nics:
        if nic.network is None or nic.network in leading_out:
            return nic
    if vm.spec.nics:
        raise Unsupported(
            f"{vm.name}: its ports can't be published",
            "private networks have no way in, and on a bridge a VM is reached by its own address",
            f"Attach it to a network of mode nat as well: `atoll net attach {vm.name} NETWORK`.",
        )
    raise Unsupported(f"{vm.name}: it has no network", next_step="Ports need one: create it without --network none.")


async def unpublish(vm: Vm, host_port: int, *, services: Services, protocol: Protocol = "tcp") -> None:
    """Take a published port back. Connections that stand go on until they end. Raises `NotFound`."""
    for nic in vm.spec.nics:
        for port in nic.ports:
            if (port.host_port, port.protocol) == (host_port, protocol):
                request = PortRequest(vm_id=vm.id, nic=nic.name, port=port)
                await perform(UNPUBLISH, request, services=services, subject=vm.id, subject_name=vm.name)
                return
    raise NotFound(
        f"{vm.name} doesn't publish port {host_port}/{protocol}", next_step=f"`atoll port ls {vm.name}` lists them."
    )


def with_port(spec: VmSpec, request: PortRequest) -> VmSpec:
    return _with_ports(spec, request, lambda ports: (*(p for p in ports if p != request.port), request.port))


def without_port(spec: VmSpec, request: PortRequest) -> VmSpec:
    return _with_ports(spec, request, lambda ports: tuple(p for p in ports if p != request.port))


def _with_ports(spec: VmSpec, request: PortRequest, change: Any) -> VmSpec:
    nics = tuple(replace(nic, ports=change(nic.ports)) if nic.name == request.nic else nic for nic in spec.nics)
    return replace(spec, nics=nics)


def _put(context: Context[PortRequest], change: Any) -> None:
    vm, request = context.vm, context.request
    pending = None if vm.pending is None else change(vm.pending, request)
    context.services.records.put_vm(replace(vm, spec=change(vm.spec, request), pending=pending))


async def _check_new(context: Context[PortRequest]) -> None:
    """A step of its own, without undo: what failed here must not take the port from who has it."""
    if any(context.request.port in nic.ports for nic in context.vm.spec.nics):
        raise AlreadyExists(f"{context.vm.name} publishes port {context.request.port.host_port} already")


async def _record(context: Context[PortRequest]) -> None:
    _put(context, with_port)


async def _unrecord(context: Context[PortRequest]) -> None:
    _put(context, without_port)


def _control(context: Context[PortRequest]) -> Path:
    """Where ports are published for a card on a user-mode network."""
    return context.services.layout.vm(context.vm.id).network_control(context.request.nic)


def _running_nic(context: Context[PortRequest]) -> NicSpec | None:
    """The card, while the VM runs: its helper has the ports, or its network's uplink."""
    if observe.phase_of(context.services, context.vm) not in (Phase.RUNNING, Phase.PAUSED):
        return None
    return next((nic for nic in context.vm.spec.nics if nic.name == context.request.nic), None)


async def _forward(context: Context[PortRequest]) -> None:
    nic = _running_nic(context)
    if nic is None:
        _tell(context)
        return
    port = context.request.port
    check_port_free(context.vm.name, port)
    if nic.network is None:
        user_network.publish(_control(context), port, restrict=nic.restrict)
        return
    said = await network_ports.forward(context.services, nic, port, add=True)
    if said:
        raise AlreadyExists(f"{context.vm.name}: port {port.host_port} can't be published", said)


def _tell(context: Context[PortRequest]) -> None:
    """The agent answers at the ports of a VM that sleeps."""
    context.services.records.add_event("vm.changed", vm_id=context.vm.id, name=context.vm.name)


async def _unforward(context: Context[PortRequest]) -> None:
    nic = _running_nic(context)
    if nic is None:
        return
    if nic.network is None:
        user_network.unpublish(_control(context), context.request.port, restrict=nic.restrict)
    else:
        await network_ports.forward(context.services, nic, context.request.port, add=False)


async def _forward_again(context: Context[PortRequest]) -> None:
    with contextlib.suppress(AtollError):
        await _forward(context)


async def _forget(context: Context[PortRequest]) -> None:
    _put(context, without_port)
    _tell(context)


PUBLISH = Verb(
    name="port add",
    request=PortRequest,
    steps=(Step("check", _check_new), Step("record", _record, _unrecord), Step("forward", _forward, _unforward)),
)
UNPUBLISH = Verb(
    name="port rm",
    request=PortRequest,
    steps=(Step("forward", _unforward, _forward_again), Step("record", _forget, final=True)),
)
