"""Reading a bundle from a stream, once, and checking each byte of it on the way. What it has comes into a folder.

Nothing that the stream says is done before it was checked: names are ours, sizes are the manifest's, whose checksum
comes right after it, and holes are the only thing that takes no room in the stream.
"""

import hashlib
import os
import select
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from atoll.errors import AtollError, from_os_error
from atoll.host.files import CHUNK
from atoll.images.source import write_at
from atoll.model.bundle import BundledMemory, Manifest
from atoll.operations import bundle_format
from atoll.operations.bundle_check import check_manifest, refused
from atoll.operations.bundle_format import BLOCK, LARGEST_MANIFEST, MAGIC, MANIFEST, PART, VERSION, Member
from atoll.operations.bundle_write import PATIENCE, Look
from atoll.qemu import mapped_ram

CUT_SHORT = "It is incomplete: copy or export it again."
ALTERED = "It was damaged or altered: copy or export it again."
_COMPRESSED = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


class Stream:
    """A descriptor that is read once, in exact pieces; a pipe may take its time."""

    def __init__(self, descriptor: int, look: Look) -> None:
        self._descriptor, self._look = descriptor, look
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def some(self, most: int) -> bytes:
        """Up to so many bytes; none at the end."""
        self._look()
        while not self._poll.poll(PATIENCE):
            self._look()
        try:
            return os.read(self._descriptor, most)
        except OSError as error:
            raise from_os_error(error, "read the bundle") from error

    def peek(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end."""
        found = b""
        while len(found) < size and (piece := self.some(size - len(found))):
            found += piece
        return found

    def exactly(self, size: int) -> bytes:
        found = self.peek(size)
        if len(found) < size:
            raise refused("it ends too early", CUT_SHORT)
        return found

    def expect(self, content: bytes, what: str) -> None:
        if self.exactly(len(content)) != content:
            raise refused(f"{what} isn't what it has to be", ALTERED)

    def end(self) -> None:
        if self.some(1):
            raise refused("something follows its end", ALTERED)


def read_manifest(stream: Stream) -> Manifest:
    """The manifest, checked. Raises `ImageRefused` for what is no bundle, damaged, or of a newer Atoll."""
    first = stream.peek(BLOCK)
    _check_magic(first)
    if len(first) < BLOCK:
        raise refused("it ends too early", CUT_SHORT)
    try:
        size = int(first[124:135], 8)
    except ValueError:
        size = -1
    if not 0 <= size <= LARGEST_MANIFEST or first != bundle_format.header(MANIFEST, size):
        raise refused("its first block isn't what it has to be", ALTERED)
    content = stream.exactly(size)
    stream.expect(bundle_format.padding(size), "what follows its manifest")
    stream.expect(bundle_format.sums(content), "the checksum of its manifest")
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refused(
            f"its manifest can't be read: {error}", "If it comes from a newer Atoll, import it there."
        ) from error
    check_manifest(manifest)
    return manifest


def _check_magic(first: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if first.startswith(magic):
            raise refused(
                f"it is compressed with {name}", f"Decompress it on the way: `{name} -dc FILE | atoll import -`."
            )
    if not first:
        raise refused("it is empty", CUT_SHORT)
    if not first.startswith(MAGIC[: len(first)]):
        raise refused(
            "it is no bundle of Atoll's",
            "`atoll export` writes those. Disks of other programs: `atoll image import FILE`.",
        )
    version = first[len(MAGIC) :].partition(b"/")[0]
    if version.isdigit() and int(version) > VERSION:
        raise refused(
            f"it is of version {int(version)}, and this Atoll reads version {VERSION}",
            "Use a newer Atoll to import it.",
        )


def read_members(
    stream: Stream,
    manifest: Manifest,
    folder: Path,
    *,
    wanted: Collection[str],
    tell: Callable[[int], None],
) -> None:
    """Each member into a file of `path_of`; layers that aren't `wanted` are only checked. To the end of the stream."""
    done = 0
    for member in bundle_format.members(manifest):
        stream.expect(bundle_format.header(member.name, member.size), f"the header of {member.name}")
        target = None
        if member.kind != "layer" or member.id in wanted:
            target = os.open(
                path_of(folder, member.kind, member.id), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
        try:
            if member.kind == "memory":
                assert manifest.memory is not None and target is not None
                _read_memory(stream, manifest.memory, target, tell=lambda size: tell(done + size))  # noqa: B023
            else:
                _read_plain(stream, member, target, tell=lambda size: tell(done + size))  # noqa: B023
        except OSError as error:
            raise from_os_error(error, "store the bundle") from error
        finally:
            if target is not None:
                os.close(target)
        done += member.size
        stream.expect(bundle_format.padding(member.size), f"what follows {member.name}")
    stream.expect(bundle_format.end(), "its end")
    stream.end()


def path_of(folder: Path, kind: str, member_id: str) -> Path:
    return folder / (f"{kind}-{member_id}" if member_id else kind)


def _read_plain(stream: Stream, member: Member, target: int | None, *, tell: Callable[[int], None]) -> None:
    digest, offset = hashlib.sha256(), 0
    while offset < member.size:
        chunk = stream.exactly(min(CHUNK, member.size - offset))
        digest.update(chunk)
        if target is not None:
            write_at(target, chunk, offset)
        offset += len(chunk)
        tell(offset)
    _check_digest(digest.hexdigest(), member.sha256, member.name)


def _read_memory(stream: Stream, memory: BundledMemory, target: int, *, tell: Callable[[int], None]) -> None:
    """Parts in the order of their places, none over another."""
    digest, taken, last = hashlib.sha256(), 0, 0
    os.ftruncate(target, memory.size)
    while taken < memory.stored:
        head = stream.exactly(PART.size)
        digest.update(head)
        start, length = PART.unpack(head)
        taken += PART.size
        if start < last or length == 0 or start + length > memory.size or taken + length > memory.stored:
            raise refused("a part of its memory has no place", ALTERED)
        last = start + length
        while start < last:
            chunk = stream.exactly(min(CHUNK, last - start))
            digest.update(chunk)
            write_at(target, chunk, start)
            start, taken = start + len(chunk), taken + len(chunk)
            tell(taken)
    _check_digest(digest.hexdigest(), memory.sha256, "memory")
    try:
        mapped_ram.ram_of(mapped_ram.blocks(target))
    except AtollError as error:
        raise refused(f"its memory can't be used: {error.why}", ALTERED) from error


def _check_digest(found: str, wanted: str, name: str) -> None:
    if found != wanted:
        raise refused(f"the content of {name} isn't what its checksum says", ALTERED)
