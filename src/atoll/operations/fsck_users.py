"""Who needs which file: for `fsck`, on records of which some may be unreadable."""

from collections.abc import Iterable

from msgspec import Struct, field

from atoll.model.image import Image
from atoll.model.snapshot import Snapshot
from atoll.model.vm import Vm
from atoll.operations.collect import add_those_below, needed_by
from atoll.store.records import Readable

TOLD = 3
"""Commands that an advice names."""


class User(Struct, frozen=True):
    """A VM, a snapshot or an image."""

    name: str
    give_up: str
    """The command that gives it up."""


class Users(Struct):
    """Who needs each file, by id."""

    layers: dict[str, list[User]] = field(default_factory=dict)
    blobs: dict[str, list[User]] = field(default_factory=dict)
    memory: dict[str, list[User]] = field(default_factory=dict)
    """Not what is volatile: that may go with the computer's next start."""


def users_of(records: Readable) -> Users:
    users = Users()
    below = {layer.id: layer.parent for layer in records.layers}
    names = {vm.id: vm.name for vm in records.vms}
    for vm in records.vms:
        _add_vm(users, vm, below)
    for node in records.snapshots:
        _add_snapshot(users, node, names.get(node.vm_id, node.vm_name), below)
    for image in records.images:
        _add_image(users, image, below)
    return users


def _add(where: dict[str, list[User]], things: Iterable[str], user: User) -> None:
    for thing in things:
        where.setdefault(thing, []).append(user)


def _add_vm(users: Users, vm: Vm, below: dict[str, str | None]) -> None:
    user = User(f"VM {vm.name}", f"atoll rm --force {vm.name}")
    found = needed_by(spec for spec in (vm.spec, vm.pending) if spec)
    add_those_below(found.layers, below)
    _add(users.layers, found.layers, user)
    _add(users.blobs, found.blobs, user)
    if vm.suspended is not None and not vm.suspended.volatile:
        _add(users.memory, [vm.suspended.id], user)


def _add_snapshot(users: Users, node: Snapshot, vm_name: str, below: dict[str, str | None]) -> None:
    user = User(f"snapshot {vm_name}@{node.name}", f"atoll forget {vm_name} {node.name}")
    found = needed_by([node.spec])
    add_those_below(found.layers, below)
    _add(users.layers, found.layers, user)
    _add(users.blobs, found.blobs | ({node.nvram} if node.nvram else set()), user)
    if node.memory is not None and not node.memory.volatile:
        _add(users.memory, [node.memory.id], user)


def _add_image(users: Users, image: Image, below: dict[str, str | None]) -> None:
    user = User(f"image {image.name}", f"atoll image rm {image.name}")
    layers = set(image.layer_ids)
    add_those_below(layers, below)
    _add(users.layers, layers, user)
    _add(users.blobs, set(image.blob_ids), user)


def names(users: Iterable[User]) -> tuple[str, ...]:
    return tuple(user.name for user in users)


def give_up(users: Iterable[User]) -> str:
    """The commands that give up what needs a lost file."""
    commands = [f"`{user.give_up}`" for user in users]
    more = f" and {len(commands) - TOLD} more" if len(commands) > TOLD else ""
    return f"{', '.join(commands[:TOLD])}{more}"
