"""What differs between two VMs or snapshots: settings, files, blocks. `old` and `new` are as the user named them."""

from typing import Literal

from msgspec import Struct

FileKind = Literal["file", "folder", "link", "device", "pipe", "socket"]
Aspect = Literal["type", "mode", "owner", "size", "time", "target", "content"]


class SettingDifference(Struct, frozen=True, kw_only=True):
    """A setting, with what each side has; empty where it has none."""

    name: str
    old: str
    new: str


class FileDifference(Struct, frozen=True, kw_only=True):
    """A file that isn't on both sides alike."""

    change: Literal["added", "removed", "modified"]
    path: str
    """In its file system. Bytes that are no UTF-8 are written as `\\xNN`."""
    kind: FileKind
    """What it is now; of one that was removed, what it was."""
    old_size: int | None = None
    """Bytes; None where it isn't there, and for what has no size."""
    new_size: int | None = None
    aspects: tuple[Aspect, ...] = ()
    """What of a modified one differs."""


class FileSystemDifference(Struct, frozen=True, kw_only=True):
    """The files that differ in a file system that both sides have."""

    partition: int | None
    """Its number; None when the file system fills the disk."""
    kind: Literal["ext2", "ext3", "ext4"]
    files: tuple[FileDifference, ...]


class BlockDifference(Struct, frozen=True, kw_only=True):
    """Blocks that differ where no files could be read."""

    ranges: int
    """How many runs of blocks that lie side by side."""
    bytes: int
    """In whole blocks of 4 KiB."""
    why: str
    """Why they aren't told as files."""


class DiskDifference(Struct, frozen=True, kw_only=True):
    """A disk that both sides have and whose content differs."""

    name: str
    file_systems: tuple[FileSystemDifference, ...] = ()
    blocks: BlockDifference | None = None


class Difference(Struct, frozen=True, kw_only=True):
    """What differs; nothing does when all three are empty but the notes."""

    old: str
    new: str
    settings: tuple[SettingDifference, ...] = ()
    disks: tuple[DiskDifference, ...] = ()
    notes: tuple[str, ...] = ()
    """What to know before this is relied on."""

    @property
    def nothing(self) -> bool:
        return not (self.settings or self.disks)
