"""net attach, net detach

attach   check ─ record (reserves the addresses; undo: the old record) ─ plug, if it runs (undo: unplug) ─ tell
detach   unplug, if it runs (undo: plug) ─ record (point of no return) ─ cut off, if that was asked for ─ tell

A card that can't be plugged or unplugged while the guest runs comes or goes at its next start.
"""

import contextlib
import os

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, AtollError, NotFound
from atoll.model.network import Network
from atoll.model.requests import NicRequest
from atoll.model.spec import NicSpec, VmSpec
from atoll.model.state import Phase, require
from atoll.model.vm import Change, Vm
from atoll.operations import hotplug, network_ports, networks, observe, resolve_nics
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.power import control
from atoll.operations.services import Services
from atoll.qemu import devices


class NicChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    nic: NicSpec
    cut_off: bool = False
    """When the guest doesn't let go of it, it loses its cable."""


async def attach(vm: Vm, request: NicRequest, *, services: Services) -> tuple[NicSpec, Change]:
    """A further card, live where QEMU can. Raises `InvalidInput`, `NotFound` (network), `AlreadyExists`."""
    nic = resolve_nics.card(request, services.records.networks(), _all_nics(vm))
    networks.check_groups(services, nic.groups)
    devices.assign_addresses(_with_nics(vm.pending or vm.spec, (*(vm.pending or vm.spec).nics, nic), {}))
    wanted = NicChange(vm_id=vm.id, nic=nic)
    context = await perform(ATTACH, wanted, services=services, subject=vm.id, subject_name=vm.name)
    made = next(each for each in _all_nics(context.vm) if each.name == nic.name)
    return made, _change(made.name, made.address or made.mac, str(context.notes.get("later", "")))


async def detach(vm: Vm, network: Network, *, services: Services, now: bool = False) -> Change:
    """Take the card on a network away, live where the guest lets go. Raises `NotFound`.

    With `now` a card that the guest holds is cut off, and led to nowhere.
    """
    nic = next((each for each in _all_nics(vm) if each.network == network.id), None)
    if nic is None:
        raise NotFound(
            f"{vm.name} isn't on the network '{network.name}'", next_step=f"`atoll show {vm.name}` tells its cards."
        )
    request = NicChange(vm_id=vm.id, nic=nic, cut_off=now)
    context = await perform(DETACH, request, services=services, subject=vm.id, subject_name=vm.name)
    return _change(nic.name, "removed", str(context.notes.get("later", "")))


def _change(name: str, value: str, later: str) -> Change:
    return Change(name=name, value=value, when="next-start" if later else "now", why=later)


def _all_nics(vm: Vm) -> tuple[NicSpec, ...]:
    """Those of the next start, and those that a running VM keeps until then."""
    later = vm.pending.nics if vm.pending is not None else ()
    names = {nic.name for nic in vm.spec.nics}
    return (*vm.spec.nics, *(nic for nic in later if nic.name not in names))


def _runs(context: Context[NicChange]) -> bool:
    return observe.phase_of(context.services, context.vm) in (Phase.RUNNING, Phase.PAUSED)


def _with_nics(spec: VmSpec, changed: tuple[NicSpec, ...], plugged: dict[str, str]) -> VmSpec:
    spec = replace(spec, nics=changed, addresses=spec.addresses | plugged)
    return replace(spec, addresses=devices.assign_addresses(spec))


def _put(context: Context[NicChange], nic: NicSpec | None, *, now: bool, vm: Vm | None = None) -> None:
    """Record the card, or that it is gone: for the running machine and the next start, or for the next start only."""
    vm, name, port = vm or context.vm, context.request.nic.name, context.notes.get("port")
    plugged = {f"nic-{name}": port} if now and nic is not None and port else {}

    def changed(spec: VmSpec) -> VmSpec:
        others = tuple(each for each in spec.nics if each.name != name)
        return _with_nics(spec, others if nic is None else (*others, nic), plugged)

    spec, later = changed(vm.spec) if now else vm.spec, changed(vm.pending or vm.spec)
    context.services.records.put_vm(replace(vm, spec=spec, pending=None if later == spec else later))


def _recorded(context: Context[NicChange]) -> NicSpec:
    """The card with its address."""
    name = context.request.nic.name
    return next((nic for nic in _all_nics(context.vm) if nic.name == name), context.request.nic)


async def _check(context: Context[NicChange]) -> None:
    """A step of its own, without undo: a card that is there isn't taken away."""
    vm, nic = context.vm, context.request.nic
    require(vm.name, observe.phase_of(context.services, vm), "disk")
    if any(nic.name == each.name or nic.network == each.network is not None for each in _all_nics(vm)):
        raise AlreadyExists(f"{vm.name}: another command gave it such a card", next_step="Try again.")


async def _record(context: Context[NicChange]) -> None:
    if any(nic.name == context.request.nic.name for nic in _all_nics(context.vm)):
        return
    vm, wanted = context.vm, context.request.nic
    async with networks.addressed(context.services, replace(vm, spec=replace(vm.spec, nics=(wanted,)))) as made:
        _put(context, made.spec.nics[0], now=not _runs(context), vm=vm)


async def _unrecord(context: Context[NicChange]) -> None:
    vm = context.services.records.vm(context.subject)
    if vm is not None and any(nic.name == context.request.nic.name for nic in _all_nics(vm)):
        name = context.request.nic.name
        specs = [
            None if spec is None else _with_nics(spec, tuple(nic for nic in spec.nics if nic.name != name), {})
            for spec in (vm.spec, vm.pending)
        ]
        assert specs[0] is not None
        pending = None if specs[1] == specs[0] else specs[1]
        context.services.records.put_vm(replace(vm, spec=specs[0], pending=pending))
    await _names(context)


async def _plug(context: Context[NicChange]) -> None:
    if not _runs(context):
        return
    nic = _recorded(context)
    async with control(context.services, context.vm) as monitor:
        port = await hotplug.free_port(monitor)
        if port is None:
            context.notes["later"] = f"its {devices.HOTPLUG_PORTS} hot-plug ports are used"
            return
        context.notes["port"] = port
        if nic.network is not None:
            tap = await networks.tap_for(context.services, context.vm, nic)
            try:
                await monitor.send_descriptor("getfd", {"fdname": devices.network_descriptor(nic)}, tap)
            finally:
                os.close(tap)
        backend = devices.network_backend(nic)
        if nic.network is not None:
            backend |= {"fd": devices.network_descriptor(nic)}
        await monitor.execute("netdev_add", backend)
        await monitor.execute("device_add", devices.network_device(context.vm.spec, nic, bus=port))
    _put(context, nic, now=True)


async def _unplug(context: Context[NicChange]) -> None:
    """What isn't there is fine."""
    if not _runs(context):
        return
    name = context.request.nic.name
    async with control(context.services, context.vm) as monitor:
        later = await hotplug.unplug(monitor, f"nic-{name}")
        if later:
            context.notes["later"] = later
            return
        descriptor = devices.network_descriptor(context.request.nic)
        for command, arguments in (("netdev_del", {"id": f"net-{name}"}), ("closefd", {"fdname": descriptor})):
            with contextlib.suppress(AtollError):
                await monitor.execute(command, arguments)


async def _plug_again(context: Context[NicChange]) -> None:
    with contextlib.suppress(AtollError):
        await _plug(context)


async def _record_removed(context: Context[NicChange]) -> None:
    if not context.notes.get("later"):
        await network_ports.unpublish_all(context.services, (_recorded(context),))
    _put(context, None, now=not context.notes.get("later"))


async def _names(context: Context[NicChange]) -> None:
    network = context.request.nic.network
    await networks.tell_names(context.services, [network] if network else [])


async def _tell(context: Context[NicChange]) -> None:
    await _names(context)
    vm, nic = context.vm, context.request.nic
    context.services.records.add_event("vm.attached", vm_id=vm.id, name=vm.name, data={"nic": nic.name})


async def _tell_removed(context: Context[NicChange]) -> None:
    await _names(context)
    vm, nic = context.vm, context.request.nic
    context.services.records.add_event("vm.detached", vm_id=vm.id, name=vm.name, data={"nic": nic.name})


async def _cut_off(context: Context[NicChange]) -> None:
    """The running machine's card has no cable any more."""
    nic = _recorded(context)
    if not nic.network or not context.request.cut_off or not context.notes.get("later"):
        return
    if _runs(context):
        async with control(context.services, context.vm) as monitor:
            with contextlib.suppress(AtollError):
                await monitor.execute("set_link", {"name": f"net-{nic.name}", "up": False})
    await network_ports.unpublish_all(context.services, (nic,))
    vm = context.vm
    nics = tuple(networks.alone(each) if each.name == nic.name else each for each in vm.spec.nics)
    context.services.records.put_vm(replace(vm, spec=replace(vm.spec, nics=nics)))


ATTACH = Verb(
    name="net attach",
    request=NicChange,
    steps=(
        Step("check", _check),
        Step("record", _record, _unrecord),
        Step("plug", _plug, _unplug),
        Step("tell", _tell, final=True),
    ),
)
DETACH = Verb(
    name="net detach",
    request=NicChange,
    steps=(
        Step("unplug", _unplug, _plug_again),
        Step("record", _record_removed, final=True),
        Step("cut off", _cut_off),
        Step("tell", _tell_removed),
    ),
)
