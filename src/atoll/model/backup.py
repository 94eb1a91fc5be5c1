"""A backup: the disks and the machine of one instant, complete in a folder of their own."""

from typing import Annotated

from msgspec import Meta, Struct, field

from atoll.model.spec import VmSpec

FORMAT = 1
"""Of the folder. A higher number is one that this Atoll can't read."""
MAGIC = "atoll-backup"

# They become names of files, and the folder may be anybody's.
Id = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
BackupId = Annotated[str, Meta(pattern=r"^[0-9]{8}T[0-9]{6}Z-[0-9a-f]{4}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Marker(Struct, frozen=True, kw_only=True):
    """What the file `atoll-backup.json` says. Fields of newer formats are passed over: the number decides."""

    magic: str
    format: int


class StoredLayer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer's file in the folder."""

    id: Id
    sha256: Sha256
    size: int
    """Bytes of the file; its holes are counted."""
    virtual_size: int


class StoredBlob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plain file in the folder: a kernel, an ISO image, UEFI variables."""

    sha256: Sha256
    size: int


class BackupDisk(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk's layers, lowest first. One without any is blank."""

    name: str
    size: int
    chain: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    """Layers that the VM's chain had, and that have no data: the folder doesn't have them."""


class Backup(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A manifest. The backup exists exactly when this file does."""

    id: BackupId
    """Its time in UTC, then four hexadecimal digits: `20260131T235959Z-1a2b`."""
    vm_id: Id
    vm_name: str
    """The VM's name at that instant."""
    created_at: float
    """The instant."""
    image: str
    spec: VmSpec
    """Its disks have no heads; a disk's layer is the last of its chain."""
    disks: tuple[BackupDisk, ...]
    layers: tuple[StoredLayer, ...] = ()
    blobs: tuple[StoredBlob, ...] = ()
    nvram: Sha256 | None = None
    """SHA-256 of the blob with its UEFI variables."""
    message: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    quiesced: bool = False
    """The guest's file systems were frozen at that instant."""
    seeded: bool = False
    added: int = 0
    """Bytes that the folder hadn't got before."""

    @property
    def size(self) -> int:
        """Bytes of all that it needs."""
        return sum(layer.size for layer in self.layers) + sum(blob.size for blob in self.blobs)


def blobs_of(spec: VmSpec) -> set[str]:
    """SHA-256 of the plain files that a machine has."""
    boot = (spec.boot.kernel, spec.boot.initrd, spec.boot.rom)
    return {blob for blob in (*boot, *(disk.blob for disk in spec.disks)) if blob}


def flaw(backup: Backup) -> str:
    """Why a manifest that could be read can't be true; empty when it can."""
    layers = {layer.id for layer in backup.layers}
    disks = {disk.name: disk for disk in backup.disks}
    needed = blobs_of(backup.spec) | ({backup.nvram} if backup.nvram else set())
    if missing := needed - {blob.sha256 for blob in backup.blobs}:
        return f"the file {min(missing)[:12]} is missing in its list"
    for disk in backup.spec.disks:
        if "/" in disk.name or disk.name.startswith(".") or disk.head:
            return f"it has a disk {disk.name!r}"
        if disk.blob is not None:
            continue
        stored = disks.get(disk.name)
        if stored is None or (stored.size, stored.chain[-1:]) != (disk.size, (disk.layer,) if disk.layer else ()):
            return f"its lists of the disk {disk.name} differ"
        if missing := set(stored.chain) - layers:
            return f"the layer {min(missing)[:12]} is missing in its list"
    return ""


class Damage(Struct, frozen=True, kw_only=True):
    """What `verify` found."""

    path: str
    why: str
    backups: tuple[str, ...]
    """The ids of the backups that can't be restored because of it."""


class Verified(Struct, frozen=True, kw_only=True):
    """What `verify` read, and found."""

    backups: int
    files: int
    size: int
    """Bytes."""
    damages: tuple[Damage, ...]


class Keep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which backups stay: the last ones, and the newest of each of the last hours, days … that have one."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0


class KeptBackup(Struct, frozen=True, kw_only=True):
    id: str
    reasons: tuple[str, ...]
    """`last`, `daily` …"""


class Pruned(Struct, frozen=True, kw_only=True):
    """What `prune` removed, or would remove."""

    removed: tuple[str, ...]
    """Ids of backups."""
    kept: tuple[KeptBackup, ...]
    files: int
    freed: int
    """Bytes of layers and plain files that no backup needs any more."""
