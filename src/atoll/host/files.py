"""Writing files so that nothing is lost: a temporary name, fsync, rename."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from atoll.errors import from_os_error

CHUNK = 1 << 20


def write_atomically(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace `path` as a whole: after a crash either the old or the new content is there. Raises `StorageFailed`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            # Whatever this user's mask is.
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise from_os_error(error, f"write {path}") from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def freeze(temporary: Path, final: Path) -> None:
    """Make a finished file read-only, durable, and known by its last name. Raises `StorageFailed`."""
    try:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o444)
        temporary.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        raise from_os_error(error, f"store {final}") from error


def make_folder(path: Path, mode: int = 0o700) -> Path:
    """The folder, made with its parents if it isn't there, for this user only. Raises `StorageFailed`."""
    try:
        _make_all(path, mode)
    except OSError as error:
        raise from_os_error(error, f"make the folder {path}") from error
    return path


def _make_all(path: Path, mode: int) -> None:
    # `mkdir(parents=True)` would open the parents to everyone.
    try:
        path.mkdir(mode=mode, exist_ok=True)
    except FileNotFoundError:
        _make_all(path.parent, mode)
        path.mkdir(mode=mode, exist_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises `StorageFailed`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, which is made with its folder if it isn't there. Raises `StorageFailed`."""
    make_folder(path.parent)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_os_error(error, f"open {path}") from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive `flock` on `path`; yields whether it was got (always true when waiting).

    The lock goes with the process, whatever kills it; the file stays, since removing it would let two holders in.
    Raises `StorageFailed`.
    """
    descriptor = open_lock(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
