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
    import ctypes

    system = ctypes.CDLL(None, use_errno=True)
    for number in range(most):
        copy = int(system.syscall(_GET_DESCRIPTOR, process, number, 0))
        if copy < 0 and (code := ctypes.get_errno()) != errno.EBADF:
            raise OSError(code, os.strerror(code))
        if copy >= 0:
            os.set_inheritable(copy, False)
            try:
                yield copy
            finally:
                os.close(copy)
