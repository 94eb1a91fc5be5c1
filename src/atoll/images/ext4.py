"""Files and file systems for images, made without root: everything inside belongs to root all the same."""

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from atoll.errors import ProcessFailed, from_os_error
from atoll.host import process


class Tree:
    """The files of an image to be, by absolute path; every one owned by root and of the same time, so that the same
    files give the same bytes."""

    def __init__(self, *, time: int) -> None:
        """`time` in seconds since 1970, the time of every file."""
        self._time = time
        self._entries: dict[str, tuple[tarfile.TarInfo, bytes | Path]] = {}

    def _add(self, path: str, kind: bytes, *, mode: int, content: bytes | Path = b"", target: str = "") -> None:
        info = tarfile.TarInfo(path.strip("/"))
        info.type, info.mode, info.mtime, info.linkname = kind, mode, self._time, target
        info.size = content.stat().st_size if isinstance(content, Path) else len(content)
        parent = os.path.dirname(info.name)  # noqa: PTH120 - a name in the image, not a path here
        if parent and parent not in self._entries:
            self.folder(parent)
        self._entries[info.name] = (info, content)

    def folder(self, path: str, mode: int = 0o755) -> None:
        self._add(path, tarfile.DIRTYPE, mode=mode)

    def file(self, path: str, content: bytes | str | Path, mode: int = 0o644) -> None:
        """A file with this content, or with that of a file of this computer."""
        data = content.encode() if isinstance(content, str) else content
        self._add(path, tarfile.REGTYPE, mode=mode, content=data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link at `path` that leads to `target`."""
        self._add(path, tarfile.SYMTYPE, mode=0o777, target=target)

    def write_tar(self, path: Path) -> None:
        """All the files as a tar archive, sorted."""
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
            for name in sorted(self._entries):
                info, content = self._entries[name]
                if isinstance(content, Path):
                    with content.open("rb") as file:
                        archive.addfile(info, file)
                else:
                    archive.addfile(info, io.BytesIO(content))

    def cpio(self) -> bytes:
        """All the files as an initial RAM disk that isn't compressed (the kernel's buffer-format.rst, `newc`)."""
        parts = []
        for number, name in enumerate(sorted(self._entries), start=1):
            info, content = self._entries[name]
            data = content.read_bytes() if isinstance(content, Path) else content
            kind = {tarfile.DIRTYPE: 0o040000, tarfile.REGTYPE: 0o100000, tarfile.SYMTYPE: 0o120000}[info.type]
            if info.issym():
                data = info.linkname.encode()
            parts.append(_cpio_entry(name, data, number=number, mode=kind | info.mode, time=self._time))
        parts.append(_cpio_entry("TRAILER!!!", b"", number=0, mode=0, time=0))
        return b"".join(parts)


def _cpio_entry(name: str, data: bytes, *, number: int, mode: int, time: int) -> bytes:
    encoded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, time, size, the file's device (2), the device it stands for (2), length of name, sum
    fields = (number, mode, 0, 0, 1, time, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


@contextlib.contextmanager
def disk_errors_told(folder: Path) -> Iterator[None]:
    """A full or read-only disk as the user should read it. Raises `StorageFailed`."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, f"build the image in {folder}") from error


async def make_ext4(
    tar: Path, image: Path, *, size: int, label: str, identity: str, time: int, offset: int = 0
) -> None:
    """Put an ext4 file system with the archive's files, owners and modes into `image`, at `offset`.

    `size` and `offset` in bytes; `identity` is the UUID of the file system. The image is sparse, and marked as zeroed,
    so neither we nor the guest's first boot write its empty tables. Raises `ProcessFailed`, `MissingTool`.
    """
    extended = f"offset={offset},hash_seed={identity},lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
    options = ["-q", "-F", "-t", "ext4", "-L", label, "-U", identity, "-m", "1", "-E", extended]
    environment = {"SOURCE_DATE_EPOCH": str(time), "LC_ALL": "C.UTF-8"}
    where = [str(image), f"{size // 1024}k"]
    with image.open("ab") as file:
        file.truncate(max(offset + size, image.stat().st_size))
    try:
        await process.run(["mke2fs", *options, "-d", tar, *where], env=environment)
    except ProcessFailed as error:
        # Before e2fsprogs 1.47.1, or without libarchive, mke2fs takes a folder only; fakeroot lends it the owners.
        if "not a directory" not in error.text.lower() and "libarchive" not in error.text:
            raise
        await _make_by_folder(["mke2fs", *options], tar, where=where, environment=environment)


async def _make_by_folder(mke2fs: list[str], tar: Path, *, where: list[str], environment: dict[str, str]) -> None:
    script = (
        'tar -xpf "$1" -C "$2" && folder=$2 && shift 2 && mke2fs=$(command -v "$1") && shift && exec "$mke2fs" "$@"'
    )
    folder = tar.with_suffix(".folder")
    folder.mkdir()
    try:
        command = [process.find(mke2fs[0]), *mke2fs[1:], "-d", str(folder), *where]
        await process.run(["fakeroot", "sh", "-c", script, "sh", tar, folder, *command], env=environment)
    finally:
        await process.run(["rm", "-rf", folder], check=False)


async def to_qcow2(raw: Path, layer: Path) -> None:
    """Turn a raw image into a layer: a qcow2 file without a backing file. Raises `ProcessFailed`."""
    await process.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, layer])
