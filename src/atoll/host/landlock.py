"""Landlock: a process lays down for ever what it may open (landlock(7), the kernel's userspace-api/landlock)."""

import contextlib
import os
from collections.abc import Iterable

from atoll.host import syscalls

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, IOCTL_DEV = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 15
REMOVE_FILE, MAKE_SOCKET = 1 << 5, 1 << 9
_FILES_BY_VERSION = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: IOCTL_DEV}
"""The rights on files that each version of the interface brought: all up to MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV."""
_MAKE_CHAR, _MAKE_FIFO, _MAKE_BLOCK = 1 << 6, 1 << 10, 1 << 11
NOT_SERVED = EXECUTE | IOCTL_DEV | _MAKE_CHAR | MAKE_SOCKET | _MAKE_FIFO | _MAKE_BLOCK
"""What nobody may do in a folder that is served: run programs, make special files."""
_BIND_AND_CONNECT_TCP, _ABSTRACT_SOCKETS_AND_SIGNALS = 3, 3


def known_rights(version: int) -> int:
    return sum(rights for since, rights in _FILES_BY_VERSION.items() if since <= version)


def restrict(
    version: int,
    *,
    programs: Iterable[str],
    readable: Iterable[int],
    devices: Iterable[str],
    served: Iterable[tuple[str, bool]] = (),
    sockets_in: str | None = None,
    tcp: bool = False,
) -> None:
    """From here on this process opens nothing but these: folders and files to read and execute, descriptors' files to
    read, devices to use, folders to serve (with whether they are read-only); and makes nothing else but sockets in one
    folder. No TCP unless that is allowed and, where the kernel can, no abstract sockets and signals to those outside.
    """
    rights = known_rights(version)
    ruleset = syscalls.landlock_ruleset(
        rights,
        _BIND_AND_CONNECT_TCP if version >= 4 and not tcp else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if version >= 6 else 0,
        version=version,
    )
    try:
        for path in programs:
            _allow_path(ruleset, path, EXECUTE | READ_FILE | READ_DIR)
        for path in devices:
            _allow_path(ruleset, path, (READ_FILE | WRITE_FILE | IOCTL_DEV) & rights)
        for path, read_only in served:
            _allow_path(ruleset, path, READ_FILE | READ_DIR if read_only else rights & ~NOT_SERVED)
        if sockets_in is not None:
            _allow_path(ruleset, sockets_in, READ_DIR | MAKE_SOCKET | REMOVE_FILE)
        for descriptor in readable:
            syscalls.landlock_allow(ruleset, descriptor, READ_FILE)
        syscalls.landlock_restrict(ruleset)
    finally:
        os.close(ruleset)


def restrict_scopes(version: int) -> None:
    """Only abstract sockets and signals of those outside, where the kernel can."""
    if version < 6:
        return
    ruleset = syscalls.landlock_ruleset(0, 0, _ABSTRACT_SOCKETS_AND_SIGNALS, version=version)
    try:
        syscalls.landlock_restrict(ruleset)
    finally:
        os.close(ruleset)


def _allow_path(ruleset: int, path: str, access: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            folder = os.path.isdir(path)  # noqa: PTH112 - between fork and exec, the less is done the better
            syscalls.landlock_allow(ruleset, descriptor, access if folder else access & ~READ_DIR)
        finally:
            os.close(descriptor)
