"""A TCP proxy between a client and an agent that can be cut, and mended."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tests.helpers.ports import free_port


class Proxy:
    """Passes connections on to a port of this computer."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.accepted = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def mend(self) -> None:
        """Accept connections, from now on."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """End all connections in the middle, and accept no more."""
        if self._server is not None:
            self._server.close()
        for each in self._open:
            each.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        with contextlib.suppress(OSError):
            await asyncio.gather(_copy(reader, back), _copy(there, writer))
        self._open -= {writer, back}


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    finally:
        target.close()


@contextlib.asynccontextmanager
async def proxy_to(url: str) -> AsyncIterator[Proxy]:
    """A proxy before the agent at a URL."""
    proxy = Proxy(int(url.rpartition(":")[2]))
    await proxy.mend()
    try:
        yield proxy
    finally:
        await proxy.cut()
