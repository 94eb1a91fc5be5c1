"""Unix sockets that are handed to QEMU, and connections to them.

A socket's address has at most 107 bytes (`sun_path`, unix(7)), and a folder under ATOLL_HOME may be longer. So sockets
are bound and reached as `/proc/self/fd/N/name`, N being the opened folder.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from atoll.errors import from_os_error


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """What to bind or connect to for the socket at `path`, however long that is."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def listen(path: Path, *, backlog: int = 64) -> socket.socket:
    """A listening socket at `path`, in place of one that was there. Raises `StorageFailed`.

    The folder's mode (0700) keeps other users out. QEMU gets the descriptor and serves it; whoever connects before QEMU
    is up waits in the backlog, so nobody has to try again and again.
    """
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with address_of(path) as address:
            server.bind(address)
        server.listen(backlog)
    except OSError as error:
        server.close()
        raise from_os_error(error, f"listen on {path}") from error
    return server


def connect(path: Path, *, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A non-blocking connection. Raises `FileNotFoundError` or `ConnectionRefusedError` when nobody listens."""
    client = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        client.setblocking(False)
        with address_of(path) as address:
            # A Unix socket connects at once or fails: with EAGAIN when the backlog is full.
            client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def answers(path: Path) -> bool:
    """Whether somebody listens there. A socket that a killed process left doesn't answer."""
    with contextlib.suppress(OSError), connect(path):
        return True
    return False


def keep_alive(connection: socket.socket) -> None:
    """Notice within a minute that the other computer has vanished, where this one only waits. Not for Unix sockets."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
