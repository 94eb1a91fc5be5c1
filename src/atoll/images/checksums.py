"""Checksums as users write them and as publishers list them."""

import re
from dataclasses import dataclass
from typing import Literal

from atoll.errors import DownloadFailed, InvalidInput

Algorithm = Literal["sha256", "sha512"]
_BY_LENGTH: dict[int, Algorithm] = {64: "sha256", 128: "sha512"}
_HEX = re.compile(r"[0-9a-fA-F]+", re.ASCII)
# GNU: "digest  name", with a '*' before the name of a file read as binary. BSD: "SHA256 (name) = digest".
_GNU = re.compile(r"([0-9a-fA-F]{64,128})[ \t]+\*?(\S.*)", re.ASCII)
_BSD = re.compile(r"SHA(?:256|512) \((.+)\) = ([0-9a-fA-F]{64,128})", re.ASCII)


@dataclass(frozen=True)
class Checksum:
    """A digest in lower-case hexadecimal."""

    algorithm: Algorithm
    digest: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.digest}"


def parse(text: str) -> Checksum:
    """A checksum from `sha256:…` or `sha512:…`, or the bare digits. Raises `InvalidInput`."""
    name, _, digits = text.strip().rpartition(":")
    found = _from_digits(digits)
    if found is None or name.lower() not in ("", found.algorithm):
        raise InvalidInput(
            f"{text!r} is not a checksum",
            "it needs 64 hexadecimal digits for sha256, or 128 for sha512",
            "Write it like sha256:9f86d081….",
        )
    return found


def find_in(listing: str, file_name: str, *, origin: str) -> Checksum:
    """The strongest checksum of a file in a publisher's list: GNU or BSD style, or digits alone.

    A signature in clear around the list is stepped over, not checked. Raises `DownloadFailed` when the list (from
    `origin`) doesn't name the file.
    """
    lines = [line.strip() for line in listing.splitlines() if line.strip()]
    found = [checksum for line in lines if (checksum := _of_line(line, file_name)) is not None]
    if not found and len(lines) == 1:
        # A file of its own beside the image (Alpine's .sha512) may have nothing but the digits.
        found = [checksum for checksum in [_from_digits(lines[0])] if checksum is not None]
    if not found:
        raise DownloadFailed(
            f"{origin} has no checksum for {file_name}", "the publisher changed its files", "Try again in an hour."
        )
    return max(found, key=lambda checksum: len(checksum.digest))


def _of_line(line: str, file_name: str) -> Checksum | None:
    if match := _BSD.fullmatch(line):
        name, digits = match[1], match[2]
    elif match := _GNU.fullmatch(line):
        digits, name = match[1], match[2]
    else:
        return None
    return _from_digits(digits) if name.rsplit("/", 1)[-1] == file_name else None


def _from_digits(digits: str) -> Checksum | None:
    algorithm = _BY_LENGTH.get(len(digits))
    return Checksum(algorithm, digits.lower()) if algorithm and _HEX.fullmatch(digits) else None
