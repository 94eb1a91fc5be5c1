"""Large files to and from an agent: they go on where a lost connection left them. The contract of the HTTP API."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from atoll.model.spec import Arch, Firmware

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
TransferId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]


class UploadRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that will come in pieces."""

    size: Annotated[int, Meta(ge=0, le=1 << 50)]
    """Bytes."""
    sha256: Sha256 | None = None
    """What it has to be; checked before it is used."""
    name: Annotated[str, Meta(max_length=255)] = ""
    """The file's name over there, to be shown."""


class Upload(Struct, frozen=True, kw_only=True):
    """A file that comes in pieces, as far as it has come."""

    id: str
    size: int
    offset: int
    """Bytes that are here: the next piece begins there."""
    sha256: str | None = None
    name: str = ""


class UploadedImage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that was uploaded, and that becomes an image. As `ImportRequest`, with uploads in place of paths."""

    upload: TransferId
    name: str | None = None
    """The stem of the upload's name when None."""
    format: Literal["qcow2", "raw", "vmdk", "vdi", "vpc", "vhdx", "iso", "floppy", "kernel"] | None = None
    arch: Arch | None = None
    initrd: TransferId | None = None
    """The upload of a RAM disk, for a kernel."""
    cmdline: str = ""
    firmware: Firmware | None = None
    agent: bool = False
    description: str = ""


class BundleRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bundle to be written for download."""

    source: str
    """A VM (`web`), or a snapshot (`web@clean`)."""
    base: str | None = None
    disk_only: bool = False


class WrittenBundle(Struct, frozen=True, kw_only=True):
    """A bundle that waits to be downloaded."""

    id: str
    size: int
