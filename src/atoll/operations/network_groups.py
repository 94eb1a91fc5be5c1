"""net group create, net group set, net group rm; net set

group …   check ─ record (undo: as it was, told) ─ tell the networks
net set   check ─ record (undo: as it was, told) ─ tell the network

Rules hold at once for machines that run. What was let through before goes on until it ends.
"""

import time
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, NotFound, WrongState
from atoll.model import groups
from atoll.model.groups import Group, GroupInfo
from atoll.model.requests import NicSetRequest
from atoll.model.spec import NicSpec, VmSpec
from atoll.model.units import format_rate
from atoll.model.vm import Change, Vm
from atoll.operations import networks, resolve_nics
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.services import Services


class GroupChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    before: Group | None
    after: Group | None


class CardChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    before: NicSpec
    after: NicSpec


def list_groups(services: Services) -> list[GroupInfo]:
    users: dict[str, set[str]] = {}
    for cards in services.records.attached().values():
        for card in cards:
            for name in card.groups:
                users.setdefault(name, set()).add(card.vm)
    return [
        GroupInfo(
            name=each.name,
            created_at=each.created_at,
            rules=tuple(str(rule) for rule in each.rules),
            vms=tuple(sorted(users.get(each.name, ()))),
        )
        for each in services.records.groups()
    ]


def find_group(services: Services, name: str) -> Group:
    """Raises `NotFound`."""
    networks.check_groups(services, [name])
    return next(group for group in services.records.groups() if group.name == name)


async def create_group(name: str, rules: Sequence[str], *, services: Services) -> None:
    """Raises `InvalidInput`, `AlreadyExists`, `NotFound` for a group that the rules mean."""
    groups.check_name(name)
    if any(group.name == name for group in services.records.groups()):
        raise AlreadyExists(
            f"there is a security group '{name}' already",
            next_step=f"Choose another name, or change it with `atoll net group set {name}`.",
        )
    made = Group(name=name, created_at=time.time(), rules=groups.parse_rules(rules))
    await _change(CREATE_GROUP, GroupChange(before=None, after=made), services=services)


async def set_group(name: str, rules: Sequence[str], *, services: Services) -> None:
    """Other rules in place of those that it has. Raises `InvalidInput`, `NotFound`."""
    before = find_group(services, name)
    after = replace(before, rules=groups.parse_rules(rules))
    await _change(SET_GROUP, GroupChange(before=before, after=after), services=services)


async def remove_group(name: str, *, services: Services) -> None:
    """Raises `NotFound`, `WrongState` while cards have it or rules mean it."""
    request = GroupChange(before=find_group(services, name), after=None)
    await _change(REMOVE_GROUP, request, services=services)


async def _change(verb: Verb[GroupChange], request: GroupChange, *, services: Services) -> None:
    group = request.after or request.before
    assert group is not None
    subject = f"group-{group.name}"
    await perform(verb, request, services=services, subject=subject, subject_name=group.name)


def _recorded(context: Context[GroupChange]) -> Group | None:
    name = context.subject.removeprefix("group-")
    return next((group for group in context.services.records.groups() if group.name == name), None)


async def _check_group(context: Context[GroupChange]) -> None:
    if _recorded(context) != context.request.before:
        raise WrongState("another command changed the security group", next_step="Try again.")


def _put_group(context: Context[GroupChange], group: Group | None) -> None:
    if group is not None:
        context.services.records.put_group(group)
    else:
        context.services.records.remove_group(context.subject.removeprefix("group-"))


async def _record_group(context: Context[GroupChange]) -> None:
    _put_group(context, context.request.after)


async def _unrecord_group(context: Context[GroupChange]) -> None:
    if _recorded(context) != context.request.before:
        _put_group(context, context.request.before)
        await _tell_all(context)


async def _tell_all(context: Context[GroupChange]) -> None:
    await networks.tell_names(context.services, context.services.records.attached())
    if _recorded(context) is None:
        context.services.layout.vm_lock(context.subject).unlink(missing_ok=True)


async def set_card(vm: Vm, request: NicSetRequest, *, services: Services) -> list[Change]:
    """Other groups, or another limit, for a card on a network. Raises `InvalidInput`, `NotFound`."""
    before = networks.card_of(services, vm, network=request.network, shared=True)
    after = before
    if request.groups is not None:
        networks.check_groups(services, request.groups)
        after = replace(after, groups=resolve_nics.check_groups(request.groups))
    if request.limit is not None:
        after = replace(after, limit=resolve_nics.check_limit(request.limit))
    wanted = CardChange(vm_id=vm.id, before=before, after=after)
    await perform(SET_CARD, wanted, services=services, subject=vm.id, subject_name=vm.name)
    changes = []
    if after.groups != before.groups:
        changes.append(Change(name=f"{before.name} groups", value=" ".join(after.groups) or "none", when="now"))
    if after.limit != before.limit:
        changes.append(Change(name=f"{before.name} limit", value=format_rate(after.limit), when="now"))
    return changes


def _put_card(context: Context[CardChange], wanted: NicSpec) -> None:
    def changed(spec: VmSpec) -> VmSpec:
        nics = (
            replace(nic, groups=wanted.groups, limit=wanted.limit)
            if (nic.name, nic.network) == (wanted.name, wanted.network)
            else nic
            for nic in spec.nics
        )
        return replace(spec, nics=tuple(nics))

    vm = context.vm
    pending = None if vm.pending is None else changed(vm.pending)
    context.services.records.put_vm(replace(vm, spec=changed(vm.spec), pending=pending))


async def _check_card(context: Context[CardChange]) -> None:
    before = context.request.before
    now = next((nic for nic in context.vm.spec.nics if nic.name == before.name), None)
    if now is None or now.network != before.network:
        raise NotFound(f"{context.vm.name}: another command took its card away", next_step="Try again.")


async def _record_card(context: Context[CardChange]) -> None:
    _put_card(context, context.request.after)


async def _unrecord_card(context: Context[CardChange]) -> None:
    if context.services.records.vm(context.subject) is not None:
        _put_card(context, context.request.before)
        await _apply_card(context)


async def _apply_card(context: Context[CardChange]) -> None:
    network = context.request.after.network
    await networks.tell_names(context.services, [network] if network else [])


async def _tell_card(context: Context[CardChange]) -> None:
    await _apply_card(context)
    context.services.records.add_event("vm.changed", vm_id=context.subject, name=context.vm.name)


_GROUP_STEPS = (
    Step("check", _check_group),
    Step("record", _record_group, _unrecord_group),
    Step("tell", _tell_all),
)
CREATE_GROUP = Verb(name="net group create", request=GroupChange, steps=_GROUP_STEPS)
SET_GROUP = Verb(name="net group set", request=GroupChange, steps=_GROUP_STEPS)
REMOVE_GROUP = Verb(name="net group rm", request=GroupChange, steps=_GROUP_STEPS)
SET_CARD = Verb(
    name="net set",
    request=CardChange,
    steps=(
        Step("check", _check_card),
        Step("record", _record_card, _unrecord_card),
        Step("tell", _tell_card),
    ),
)
