"""An image: a node with no VM behind it. `run` starts from one."""

from typing import Literal

from msgspec import Struct, field

from atoll.model.names import SHORT_ID
from atoll.model.spec import Arch, Bus, Firmware, GuestSpec, Machine

SourceFormat = Literal["qcow2", "raw", "vmdk", "vdi", "vpc", "vhdx", "iso", "floppy", "kernel"]


class Layer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One frozen disk layer: a qcow2 file that nothing writes any more."""

    id: str
    virtual_size: int
    file_size: int
    sha256: str = ""
    """Of the layer's file; empty until someone had to read all of it (`export`, `fsck`)."""
    parent: str | None = None
    merged: tuple[str, ...] = ()
    """The layers, lowest first, that this one was merged from: with the same parent they have the same content."""


class ImageDisk(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk that a VM made from the image gets."""

    name: str
    size: int
    layer: str | None = None
    blob: str | None = None
    bus: Bus = "virtio"
    media: Literal["disk", "cdrom"] = "disk"


class Image(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a VM starts from: layers, perhaps a kernel, and the defaults of its machine."""

    id: str
    name: str
    """With its tag: `debian:13`."""
    arch: Arch
    created_at: float
    source: str
    """Where it came from: a URL, a file, `build`."""
    sha256: str
    """Of what was imported, pulled or built: two images with the same content have the same digest."""
    disks: tuple[ImageDisk, ...] = ()
    firmware: Firmware = "bios"
    """How it boots unless the user says otherwise."""
    firmwares: tuple[Firmware, ...] = ("bios",)
    """All the ways in which it can boot."""
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str = ""
    nvram: str | None = None
    """SHA-256 of the blob with the UEFI variables that its disks boot by; the firmware's empty ones when None."""
    copy: bool = False
    """Its disks were a machine's, so each VM that is made from it is to get an identity of its own."""
    machine: Machine | None = None
    memory: int | None = None
    """Bytes a VM gets unless told otherwise."""
    display: bool = True
    guest: GuestSpec = GuestSpec()
    tags: tuple[str, ...] = ()
    """Further names."""
    description: str = ""
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def short_id(self) -> str:
        return self.id[:SHORT_ID]

    @property
    def layer_ids(self) -> tuple[str, ...]:
        return tuple(disk.layer for disk in self.disks if disk.layer)

    @property
    def blob_ids(self) -> tuple[str, ...]:
        blobs = [disk.blob for disk in self.disks] + [self.kernel, self.initrd, self.nvram]
        return tuple(blob for blob in blobs if blob)
