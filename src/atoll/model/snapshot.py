"""A snapshot: an immutable node of a VM's history. Heads stand on it, further ones have it as their parent."""

from msgspec import Struct

from atoll.model.names import SHORT_ID
from atoll.model.spec import VmSpec


class Memory(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """RAM and device state of one instant: a `mapped-ram` migration stream in a sparse file."""

    id: str
    file_size: int
    """Bytes that the file takes on the disk; its holes are not counted."""
    accelerator: str
    """What ran the guest; another one has other CPUs, so it can't go on there."""
    running: bool = True
    """Whether it ran at that instant, or was paused."""
    shared: bool = False
    """It is a snapshot's, and others may go on from it too."""
    volatile: bool = False
    """Its file is among the templates, and lasts only until those have started that it was made for."""


class Snapshot(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Disks, memory and machine of one instant."""

    id: str
    name: str
    """Unique among those of its VM."""
    vm_id: str
    vm_name: str
    """The VM's name when it was taken."""
    image: str
    created_at: float
    spec: VmSpec
    """Its disks stand on the frozen layers and have no heads."""
    parent: str | None = None
    """The snapshot that the VM stood on; it may have been forgotten meanwhile."""
    message: str = ""
    memory: Memory | None = None
    nvram: str | None = None
    """SHA-256 of the blob with its UEFI variables."""
    quiesced: bool = False
    """The guest's file systems were frozen at that instant."""
    seeded: bool = False

    @property
    def short_id(self) -> str:
        return self.id[:SHORT_ID]

    @property
    def layer_ids(self) -> tuple[str, ...]:
        return tuple(disk.layer for disk in self.spec.disks if disk.layer)


class HistoryNode(Struct, frozen=True, kw_only=True):
    """A snapshot in its tree."""

    snapshot: Snapshot
    own: int
    """Bytes of its own layers and memory: what nothing but this snapshot and those after it has."""
    shared: int
    """Bytes of the layers below: of earlier snapshots, or of the image."""
    heads: tuple[str, ...]
    """The names of VMs that stand on it."""
