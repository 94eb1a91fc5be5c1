"""What another process of ours has open: copies of its descriptors (pidfd_getfd(2))."""

import contextlib
import errno
import os
from collections.abc import Iterator

_GET_DESCRIPTOR = 438
"""The same number on every architecture."""


@contextlib.contextmanager
def handle(pid: int) -> Iterator[int]:
    """The process, though its pid may become another one's. Raises `OSError` when it has ended."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def copies(process: int, *, most: int) -> Iterator[int]:
    """Those among its first so many; each copy is closed after its turn. Raises `OSError` where we may not."""
    for number in range(most):
        copy = _copied(process, number)
        if copy is not None:
            try:
                yield copy
            finally:
                os.close(copy)


def _copied(process: int, number: int) -> int | None:
    import ctypes

    copy = int(ctypes.CDLL(None, use_errno=True).syscall(_GET_DESCRIPTOR, process, number, 0))
    if copy < 0:
        code = ctypes.get_errno()
        if code == errno.EBADF:
            return None
        raise OSError(code, os.strerror(code))
    os.set_inheritable(copy, False)
    return copy
