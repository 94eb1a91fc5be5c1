"""Reads the content of a disk, wherever in its chain of layers that is: without root, mounting, or room for a copy.

`qemu-nbd` serves the chain, read-only, to one client on a socket that is connected before it starts; it ends when that
client goes away, also when our process is killed. The client is synchronous, for use in a thread. The protocol is
doc/proto.md of github.com/NetworkBlockDevice/nbd: fixed newstyle handshake, simple replies.
"""

import asyncio
import contextlib
import errno
import os
import socket
import struct
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path

from atoll.host import process, sockets

PIECE = 1 << 16
"""Bytes that are read at once, and kept for the next reader."""
_KEPT = 512
_MAGIC, _OPTION, _REQUEST, _REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x25609513, 0x67446698
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPTION_EXPORT_NAME, _COMMAND_READ = 1, 0
# A descriptor of any number gets the number 3 in the end; POSIX shells take one digit only, so it comes as 0.
_AS_ACTIVATED = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'


class BlockReader:
    """An open disk. One thread uses it at a time; `close` may be called from another, and ends a read."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._pieces: OrderedDict[int, bytes] = OrderedDict()
        self.size = 0
        """Bytes of the disk, once `greet` is through."""

    def greet(self) -> None:
        """The handshake. Raises `OSError` when the server goes away."""
        magic, option, _ = struct.unpack(">8s8sH", self._receive(18))
        if (magic, option) != (_MAGIC, _OPTION):
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        flags = struct.pack(">I", _FIXED_NEWSTYLE | _NO_ZEROES)
        self._client.sendall(flags + _OPTION + struct.pack(">II", _OPTION_EXPORT_NAME, 0))
        self.size, _ = struct.unpack(">QH", self._receive(10))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on. Raises `ValueError` beyond the disk's end, `OSError` when they can't be read."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} lie beyond the disk's end")
        first, end = offset // PIECE, -(-(offset + length) // PIECE)
        if end - first == 1:
            start = offset - first * PIECE
            return self._piece(first)[start : start + length]
        together = b"".join(self._piece(number) for number in range(first, end))
        return together[offset - first * PIECE :][:length]

    def _piece(self, number: int) -> bytes:
        found = self._pieces.get(number)
        if found is not None:
            self._pieces.move_to_end(number)
            return found
        offset = number * PIECE
        found = self.read_anew(offset, min(PIECE, self.size - offset))
        self._pieces[number] = found
        if len(self._pieces) > _KEPT:
            self._pieces.popitem(last=False)
        return found

    def read_anew(self, offset: int, length: int) -> bytes:
        """As `read`, for much that is read once: nothing is kept."""
        self._client.sendall(struct.pack(">IHHQQI", _REQUEST, 0, _COMMAND_READ, 0, offset, length))
        magic, error, _ = struct.unpack(">IIQ", self._receive(16))
        if magic != _REPLY:
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        if error:
            raise OSError(error, os.strerror(error))
        return self._receive(length)

    def _receive(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            more = self._client.recv(length - len(received))
            if not more:
                raise OSError(errno.ECONNRESET, "qemu-nbd went away")
            received += more
        return bytes(received)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)
        self._client.close()


@contextlib.asynccontextmanager
async def reading(image: str) -> AsyncIterator[BlockReader]:
    """The disk that qemu-nbd opens as `image`. Raises `ProcessFailed`, `MissingTool`, `StorageFailed`."""
    client, server = _connected()
    reader = BlockReader(client)
    command = ["sh", "-c", _AS_ACTIVATED, "sh", process.find("qemu-nbd"), "--read-only", "--", image]
    serving = asyncio.create_task(process.run(command, stdin=server.fileno()))
    greeting = asyncio.create_task(asyncio.to_thread(reader.greet))
    try:
        try:
            await asyncio.wait((serving, greeting), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
        finally:
            # As long as it is open here, a client that nobody serves waits for ever.
            server.close()
        await greeting
        yield reader
    finally:
        reader.close()
        # Without its client the server ends; if it never had one, it is ended.
        if not greeting.done() or greeting.cancelled() or greeting.exception() is not None:
            serving.cancel()
        await asyncio.gather(serving, greeting, return_exceptions=True)


def _connected() -> tuple[socket.socket, socket.socket]:
    """A client, and the listening socket in whose backlog it is; nobody else finds that."""
    with tempfile.TemporaryDirectory(prefix="atoll-") as folder:
        path = Path(folder) / "nbd.sock"
        server = sockets.listen(path, backlog=1)
        try:
            client = sockets.connect(path)
        except BaseException:
            server.close()
            raise
    client.setblocking(True)
    return client, server
