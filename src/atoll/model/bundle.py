"""A bundle: a node with the layers under it, as one file that another Atoll takes in. What its manifest says."""

from msgspec import Struct

from atoll.model.image import Layer
from atoll.model.snapshot import Snapshot


class BundledLayer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer that the node needs."""

    layer: Layer
    """With its SHA-256."""
    size: int
    """Bytes of its file."""
    included: bool = True
    """It is in the bundle; otherwise it belongs to the base, which has to be there already."""


class BundledBlob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plain file: a kernel, an ISO image, UEFI variables."""

    sha256: str
    size: int
    included: bool = True


class BundledMemory(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The memory, without its holes: for each part that isn't one its offset, its length, and its bytes."""

    size: int
    """Bytes of the file with its holes."""
    stored: int
    """Bytes in the bundle."""
    sha256: str
    """Of what is stored."""


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle has, and what it stands on."""

    created_at: float
    snapshot: Snapshot
    layers: tuple[BundledLayer, ...] = ()
    """Each after the one below it."""
    blobs: tuple[BundledBlob, ...] = ()
    memory: BundledMemory | None = None
    base: str = ""
    """The name that the base had where this was exported; empty for a bundle that has everything."""


class ExportOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the user asked for."""

    base: str | None = None
    """`VM@SNAPSHOT`, a snapshot's id, or an image: what it has is left out."""
    disk_only: bool = False
