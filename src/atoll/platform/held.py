"""Streams to a VM that keep it in use for as long as they are open."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from atoll.platform.api import Connection, Terminal

if TYPE_CHECKING:
    from atoll.operations.uses import Use


class HeldConnection:
    """A connection, and the use that goes with it."""

    def __init__(self, stream: Connection, use: "Use") -> None:
        self._stream = stream
        self._use = use

    async def read(self) -> bytes:
        return await self._stream.read()

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def end(self) -> None:
        await self._stream.end()

    async def close(self) -> None:
        try:
            await self._stream.close()
        finally:
            self._use.close()


class HeldTerminal:
    """A terminal, and the use that goes with it."""

    def __init__(self, stream: Terminal, use: "Use") -> None:
        self._stream = stream
        self._use = use

    @property
    def exit_code(self) -> int | None:
        """A shell's, once it has ended."""
        code = getattr(self._stream, "exit_code", None)
        return code if isinstance(code, int) else None

    async def read(self) -> bytes:
        return await self._stream.read()

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def resize(self, *, rows: int, columns: int) -> None:
        await self._stream.resize(rows=rows, columns=columns)

    async def close(self) -> None:
        try:
            await self._stream.close()
        finally:
            self._use.close()


async def held(use: "Use", open_it: Callable[[], Awaitable[Connection]]) -> HeldConnection:
    """A connection that holds this use; the use ends when it can't be opened."""
    try:
        return HeldConnection(await open_it(), use)
    except BaseException:
        use.close()
        raise


async def held_terminal(use: "Use", open_it: Callable[[], Awaitable[Terminal]]) -> HeldTerminal:
    """The same for a terminal."""
    try:
        return HeldTerminal(await open_it(), use)
    except BaseException:
        use.close()
        raise
