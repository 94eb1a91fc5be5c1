"""What the rest of Atoll asks of a place for records. `store/sqlite.py` is the embedded one.

Every method is one transaction: it holds whole or not at all, also after a power cut. Methods block for a few
milliseconds at most, so they are called from coroutines as they are.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from msgspec import Struct

from atoll.model.groups import Group
from atoll.model.image import Image, Layer
from atoll.model.network import Attached, Network
from atoll.model.operation import Operation
from atoll.model.snapshot import Snapshot
from atoll.model.vm import Event, Vm


class Unreadable(Struct, frozen=True, kw_only=True):
    """A record that can't be decoded."""

    thing: str
    """`VM web`, `layer 0123456789ab` …"""
    why: str


class Readable(Struct, frozen=True, kw_only=True):
    """The records as far as they can be read."""

    vms: list[Vm]
    snapshots: list[Snapshot]
    images: list[Image]
    layers: list[Layer]
    unfinished: list[Operation]
    unreadable: list[Unreadable]
    vm_ids: frozenset[str]
    """Also of the VMs whose records can't be decoded."""


class Flaw(Struct, frozen=True, kw_only=True):
    """Something wrong with the records as a whole."""

    why: str
    repair: str = ""
    """What `mend` does about it; empty when it does nothing."""
    harmless: bool = False
    """No record is lost or lies."""


class Records(Protocol):
    """VMs, images, layers, the journal and the events."""

    def close(self) -> None: ...

    def vms(self) -> list[Vm]:
        """All VMs, oldest first."""

    def vm(self, vm_id: str) -> Vm | None: ...

    def called(self, reference: str) -> Vm | None:
        """The one with exactly this name, else with this id."""

    def throwaways(self) -> list[Vm]:
        """VMs that are removed once they have stopped."""

    def add_vm(self, vm: Vm, layers: Iterable[Layer] = (), snapshots: Iterable[Snapshot] = ()) -> None:
        """With layers that are new, and snapshots of its past.

        Raises `AlreadyExists` when the name or one of the published ports is taken.
        """

    def put_vm(self, vm: Vm) -> None:
        """Replace the record of a VM that exists. Raises `AlreadyExists` as `add_vm`, `NotFound` when it is gone."""

    def remove_vm(self, vm_id: str) -> None:
        """Idempotent."""

    def snapshots(self, vm_id: str | None = None) -> list[Snapshot]:
        """All snapshots, or those of a VM, oldest first."""

    def snapshot(self, snapshot_id: str) -> Snapshot | None: ...

    def freeze(self, vm: Vm, layers: Iterable[Layer], snapshot: Snapshot | None = None) -> None:
        """Record a VM's frozen heads as layers with the VM's new heads on them, and the snapshot that they make.

        Idempotent. Raises `AlreadyExists` when the snapshot's name is taken, `NotFound` when the VM is gone.
        """

    def put_in_place(self, layer: Layer, *, of: str) -> None:
        """Record a layer that has the same content as another; what stands on that one stands on it from now on."""

    def put_snapshot(self, snapshot: Snapshot, layers: Iterable[Layer] = ()) -> None:
        """Add or replace a snapshot, with layers that are new. Raises `AlreadyExists` when its name is taken."""

    def remove_snapshot(self, snapshot_id: str) -> None:
        """Take it out of the history: its children get its parent. Idempotent; layers and memory stay."""

    def images(self) -> list[Image]:
        """All images, oldest first."""

    def image(self, image_id: str) -> Image | None: ...

    def add_image(self, image: Image, layers: Iterable[Layer]) -> None:
        """Record an image with its new layers; a name that another image had moves to this one."""

    def put_image_names(self, image_id: str, names: Iterable[str]) -> Image:
        """Give an image exactly these names; the first is the one it is shown by. Raises `NotFound`."""

    def remove_image(self, image_id: str) -> None:
        """Idempotent. Layers stay until `remove_layers`."""

    def layers(self) -> list[Layer]: ...

    def layer(self, layer_id: str) -> Layer | None: ...

    def note_sha256(self, layer_id: str, sha256: str) -> None:
        """What the layer's file has, now that somebody has read all of it. Nothing happens if the layer is gone."""

    def put_layers(self, layers: Iterable[Layer]) -> None:
        """Add or replace layers. Those that nothing needs are removed by the next `prune`."""

    def remove_layers(self, layer_ids: Iterable[str]) -> None: ...

    def readable(self) -> Readable:
        """All that can be read, as it was at one instant, and which records can't."""

    def flaws(self, *, quick: bool) -> list[Flaw]:
        """What is wrong with the records as a whole. `quick` doesn't compare indexes with what they index."""

    def mend(self) -> None:
        """Mend each flaw that can be mended without loss. Raises `RecordsFailed`, and has changed nothing then."""

    def networks(self) -> list[Network]:
        """All networks, oldest first."""

    def network(self, network_id: str) -> Network | None: ...

    def add_network(self, network: Network) -> None:
        """Raises `AlreadyExists` when its name is taken."""

    def remove_network(self, network_id: str) -> None:
        """Idempotent. Raises `WrongState` while VMs have cards on it."""

    def attached(self, network_id: str | None = None) -> dict[str, list[Attached]]:
        """The cards on each network, or on one, by the network's id."""

    def groups(self) -> list[Group]:
        """All security groups, by their names."""

    def put_group(self, group: Group) -> None:
        """Add or replace. Raises `NotFound` when its rules mean a group that isn't there."""

    def remove_group(self, name: str) -> None:
        """Idempotent. Raises `WrongState` while cards have it or rules of others mean it."""

    def operations(self, *, unfinished: bool = False, limit: int = 200) -> list[Operation]:
        """The newest first; `unfinished` are those that run, are being undone, or are stuck."""

    def operation(self, operation_id: str) -> Operation | None: ...

    def put_operation(self, operation: Operation, *, durable: bool = True) -> None:
        """Add or replace. A cancel request that another process recorded meanwhile is kept.

        What isn't `durable` is safe from the end of this process at once, from a power cut with the next that is.
        """

    def request_cancel(self, operation_id: str) -> None: ...

    def add_event(
        self,
        kind: str,
        *,
        vm_id: str | None = None,
        name: str = "",
        data: dict[str, Any] | None = None,
        durable: bool = True,
    ) -> Event:
        """Append an event and wake its followers. For `durable` see `put_operation`."""

    def last_event(self) -> int:
        """The id of the newest event; 0 before the first."""

    def events(self, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events with an id above `after`, oldest first."""
