"""The file format of bundles: a tar archive whose every byte follows from its manifest.

    atoll-bundle-1/manifest.json      what there is; the version is in the name
    atoll-bundle-1/SHA256SUMS         the manifest's, as `sha256sum -c` takes it
    atoll-bundle-1/layers/ID.qcow2    …
    atoll-bundle-1/blobs/SHA256       …
    atoll-bundle-1/memory
    atoll-bundle-1/end                empty: the bundle is whole

A reader doesn't interpret the headers of members: it knows each from the manifest, and compares. So there are no links,
no paths and no sizes that the manifest doesn't have, and no byte can be altered unseen.
"""

import hashlib
import struct
from typing import Literal

import msgspec
from msgspec import Struct

from atoll.model.bundle import Manifest

MAGIC = b"atoll-bundle-"
VERSION = 1
ROOT = f"{MAGIC.decode()}{VERSION}/"
MANIFEST = f"{ROOT}manifest.json"
BLOCK = 512
TRAILER = bytes(2 * BLOCK)
LARGEST_MANIFEST = 4 << 20
PART = struct.Struct(">QQ")
"""Before each part of the memory: its offset in the file, its length."""
_LARGEST_OCTAL = 8**11 - 1


class Member(Struct, frozen=True, kw_only=True):
    """A file in the bundle."""

    kind: Literal["layer", "blob", "memory"]
    id: str
    """A layer's id, a blob's SHA-256."""
    name: str
    size: int
    sha256: str


def members(manifest: Manifest) -> list[Member]:
    """What follows the manifest, in its order."""
    found = [
        Member(
            kind="layer",
            id=each.layer.id,
            name=f"{ROOT}layers/{each.layer.id}.qcow2",
            size=each.size,
            sha256=each.layer.sha256,
        )
        for each in manifest.layers
        if each.included
    ]
    found += [
        Member(kind="blob", id=blob.sha256, name=f"{ROOT}blobs/{blob.sha256}", size=blob.size, sha256=blob.sha256)
        for blob in manifest.blobs
        if blob.included
    ]
    if (memory := manifest.memory) is not None:
        found.append(Member(kind="memory", id="", name=f"{ROOT}memory", size=memory.stored, sha256=memory.sha256))
    return found


def header(name: str, size: int) -> bytes:
    """The tar header of a plain file. Sizes of 8 GiB and more are binary, as GNU tar and others take them."""
    length = b"%011o\0" % size if size <= _LARGEST_OCTAL else b"\x80" + size.to_bytes(11, "big")
    before = name.encode().ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + length + b"%011o\0" % 0
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + 2 * b"0000000\0" + bytes(167)
    checksum = sum(before) + 8 * ord(" ") + sum(after)
    return before + b"%06o\0 " % checksum + after


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def plain_member(name: str, content: bytes) -> bytes:
    return header(name, len(content)) + content + padding(len(content))


def head(manifest: Manifest) -> bytes:
    """What comes before the members."""
    content = msgspec.json.encode(manifest)
    return plain_member(MANIFEST, content) + sums(content)


def sums(manifest: bytes) -> bytes:
    line = f"{hashlib.sha256(manifest).hexdigest()}  manifest.json\n"
    return plain_member(f"{ROOT}SHA256SUMS", line.encode())


def end() -> bytes:
    return header(f"{ROOT}end", 0) + TRAILER


def stored_size(manifest: Manifest) -> int:
    """Bytes of the members alone."""
    return sum(member.size for member in members(manifest))
