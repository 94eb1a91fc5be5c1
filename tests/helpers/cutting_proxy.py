"""A proxy between a client and an agent's socket, which cuts or alters what passes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path


class Proxy:
    """Listens on loopback. After as many bytes as the first of `cuts` says, the connection that has them is cut; then
    the next one counts.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.port = 0
        self.cuts: list[int] = []
        self.alter: tuple[bytes, bytes] | None = None
        """What is put in place of what, on the way to the agent."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_unix_connection(str(self._target))
        both = [
            asyncio.create_task(self._pass(reader, here, inward=True)),
            asyncio.create_task(self._pass(there, writer, inward=False)),
        ]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        for each in (writer, here):
            each.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, inward: bool) -> None:
        while piece := await source.read(1 << 16):
            if inward and self.alter:
                piece = piece.replace(*self.alter)
            if self.cuts:
                self.cuts[0] -= len(piece)
                if self.cuts[0] < 0:
                    self.cuts.pop(0)
                    return
            target.write(piece)
            await target.drain()


@contextlib.asynccontextmanager
async def proxy(target: Path) -> AsyncIterator[Proxy]:
    """One that passes everything on, until it is told otherwise."""
    made = Proxy(target)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    async with server:
        yield made
