"""A command in a stream slot of the guest, from its start to its end."""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import msgspec

from atoll.errors import Busy, GuestFailed
from atoll.layout import VmPaths
from atoll.operations import guest_scripts
from atoll.operations.guest_agent import exchange
from atoll.operations.guest_capture import kill_tree, to_its_end
from atoll.operations.guest_slot import SH, Relay, Slot, forget
from atoll.operations.guest_stream import OutputStream
from atoll.qemu.guest import Agent, Refused, UnknownProcess

ByteSink = Callable[[bytes], object]
Drain = Callable[[], Awaitable[None]]
Stdin = bytes | AsyncIterator[bytes] | None

CHUNK = 256 << 10
WRITERS_LEFT = 0.25
"""Seconds after a command's end within which the relays say that no writer is left; else something runs on."""
FIRST_LOOK, LONGEST_LOOK = 2.0, 30.0
"""Seconds without a byte after which the agent is asked whether the command is still there."""
GREETING = 60.0
"""Seconds for new relays to say that they are ready, in a guest that has much to do."""


class LostCommand(GuestFailed):
    """The command's end can't come any more: QEMU, the guest, the agent or the command's shell is gone."""


@dataclass(frozen=True)
class Place:
    """Where a command runs."""

    paths: VmPaths
    name: str
    slot: Slot
    cwd: str
    drain: Drain | None = None


class Running:
    """A command in a slot, from its start to its end."""

    def __init__(self, *, how: Place, sockets: tuple[socket.socket, socket.socket]) -> None:
        self._how = how
        self._sockets = sockets
        self._relay: Relay | None = None
        self._bytes_seen = 0
        self.streams: tuple[OutputStream, ...] = ()
        self.pid = 0

    async def start(self, command: list[str], sinks: tuple[ByteSink, ByteSink], *, with_stdin: bool) -> bool:
        """Start the command; false if the guest can't have its streams."""
        slot = self._how.slot
        first, second = secrets.token_hex(8), secrets.token_hex(8)
        script = guest_scripts.RUN_WITH_STDIN if with_stdin else guest_scripts.RUN
        async with exchange(self._how.paths, self._how.name) as agent:
            try:
                relay = await slot.prepare(agent)
            except Refused:
                return False
            if relay.uses == 0 and not await self._greeted(agent, relay):
                return False
            self._relay = msgspec.structs.replace(relay, uses=relay.uses + 1, clean=False, last=None)
            slot.remember(self._relay)
            self.streams = tuple(OutputStream(first=first, second=second, mark=relay.mark, sink=sink) for sink in sinks)
            words = ["-c", script, "sh", str(slot.number), first, second, self._how.cwd, *command]
            await self._started(agent, words)
        return True

    async def _started(self, agent: Agent, words: list[str]) -> None:
        """Start the command's shell. Who is cancelled meanwhile learns its number, since it has to be killed."""
        starting = asyncio.ensure_future(agent.start(SH, words))
        try:
            self.pid = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await to_its_end(self._numbered(starting))
            raise

    async def _numbered(self, starting: "asyncio.Future[int]") -> None:
        self.pid = await starting

    async def _greeted(self, agent: Agent, relay: Relay) -> bool:
        """Wait for the first marks of new relays; false if they end instead."""
        hello = [OutputStream(first="-", second="-", mark=relay.mark, sink=lambda _: None) for _ in self._sockets]
        reading = asyncio.gather(
            *(self._read(s, o, lambda o: o.drained) for s, o in zip(self._sockets, hello, strict=True))
        )
        for stream in hello:
            stream.marks_count = True
        pause, waited = 0.1, 0.0
        try:
            while not (await asyncio.wait({reading}, timeout=pause))[0]:
                status = await agent.status(relay.pid)
                if status.exited:
                    return False
                waited += pause
                if waited > GREETING:
                    raise self._lost(f"its streams weren't ready in {GREETING:g} s")
                pause *= 2
            await reading
            return True
        finally:
            reading.cancel()
            # Until they have let go of the ports: if those were closed before, others of their numbers would suffer.
            await asyncio.gather(reading, return_exceptions=True)

    async def attend(self, into: socket.socket | None, stdin: Stdin) -> None:
        """Move bytes until the command has ended. Raises `GuestFailed` when its end can't come any more."""
        pumps = {
            asyncio.create_task(self._read(s, o, lambda o: o.ended))
            for s, o in zip(self._sockets, self.streams, strict=True)
        }
        tasks = {*pumps, asyncio.create_task(self._look())}
        if into is not None and stdin is not None:
            tasks.add(asyncio.create_task(_feed(into, stdin)))
        pending = set(tasks)
        try:
            while pumps & pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, port: socket.socket, stream: OutputStream, enough: Callable[[OutputStream], bool]) -> None:
        loop = asyncio.get_running_loop()
        while not enough(stream):
            data = await loop.sock_recv(port, CHUNK)
            if not data:
                raise self._lost("QEMU stopped")
            self._bytes_seen += len(data)
            stream.feed(data)
            if self._how.drain is not None:
                await self._how.drain()

    async def _look(self) -> None:
        """Ask now and then whether the command is still there: a guest's reboot closes nothing on the host."""
        pause = FIRST_LOOK
        seen = -1
        while True:
            await asyncio.sleep(pause)
            if self._bytes_seen != seen:
                seen, pause = self._bytes_seen, FIRST_LOOK
                continue
            pause = min(pause * 2, LONGEST_LOOK)
            try:
                async with exchange(self._how.paths, self._how.name, timeout=5) as agent:
                    status = await agent.status(self.pid)
            except UnknownProcess:
                raise self._lost("the guest, or its agent, was started anew") from None
            except (GuestFailed, Busy):
                continue  # It is paused, or it boots: the next look will tell.
            if status.exited:
                await asyncio.sleep(1)
                raise self._lost("the command's shell ended without a word")

    def _lost(self, why: str) -> LostCommand:
        return LostCommand(
            f"{self._how.name}: lost the command in the guest", why, f"See `atoll show {self._how.name}`."
        )

    async def finish(self) -> None:
        """Leave the slot as the next command needs it."""
        assert self._relay is not None
        try:
            async with asyncio.timeout(WRITERS_LEFT):
                for port, stream in zip(self._sockets, self.streams, strict=True):
                    await self._read(port, stream, lambda o: o.drained)
        except TimeoutError:
            # Something runs on in the background: it keeps the old relays' ends, the next command gets new ones.
            async with exchange(self._how.paths, self._how.name) as agent:
                relay = await self._how.slot.renew(agent)
                await forget(agent, self.pid)
                # What they say goes to whoever is connected now, so it is heard now.
                if await self._greeted(agent, relay):
                    self._how.slot.remember(msgspec.structs.replace(relay, uses=1))
            return
        self._how.slot.remember(msgspec.structs.replace(self._relay, clean=True, last=self.pid))

    async def kill(self) -> None:
        """Kill the command and all that came from it; what it wrote before still goes to the sinks."""
        if self._relay is None:
            return
        await kill_tree(self._how.paths, self._how.name, self.pid, folder=self._how.slot.folder)
        # The slot isn't called clean, so the next command gets new relays.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(WRITERS_LEFT):
                for port, stream in zip(self._sockets, self.streams, strict=True):
                    stream.marks_count = True
                    await self._read(port, stream, lambda o: o.drained)


async def _feed(port: socket.socket, stdin: bytes | AsyncIterator[bytes]) -> None:
    """Write standard input and its end."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(port, b"\n")
        if isinstance(stdin, bytes):
            await loop.sock_sendall(port, stdin)
        else:
            async for data in stdin:
                await loop.sock_sendall(port, data)
        # Closing would throw away what QEMU hasn't read yet.
        port.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        return  # QEMU is gone; whoever reads the output tells it.
