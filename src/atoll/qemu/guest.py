"""The guest agent's protocol: JSON lines over a connected socket.

One exchange is: connect, `guest-sync-delimited`, some commands, disconnect. Replies to requests of a client that left
stay queued for the next one, hence the sync at the beginning of each
(https://www.qemu.org/docs/master/interop/qemu-ga-ref.html).
"""

import asyncio
import base64
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import msgspec

from atoll.errors import GuestFailed

LONGEST_REPLY = 64 << 20
"""Bytes. A captured output has up to 16 MiB for each of two streams, in base64."""

CAPTURE_LIMIT = 16 << 20
"""Bytes of each stream that the agent captures; it drops the rest."""

STATUS_TIME = 60.0
"""Seconds for the state of a command: with all that was captured it may be 45 MB, and an emulated guest is slow."""

SYNC_AGAIN = 2.0
"""Seconds after which a sync is sent again: the one before may have gone to an agent that a reboot ended."""

LEAST_SYNC = 1 << 50
"""Sync numbers are from here on, so that they can be told from other replies."""


class ExecStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent knows of a process that it started. With `exited` it has forgotten the process."""

    exited: bool
    exit_code: int | None = None
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False

    @property
    def code(self) -> int:
        """The exit code as a shell gives it: 128 + the number of the signal that ended it."""
        if self.signal is not None:
            return 128 + self.signal
        return self.exit_code if self.exit_code is not None else 255


class Refused(GuestFailed):
    """The agent answered a request with an error."""


class UnknownProcess(Refused):
    """The agent doesn't know the process: it was started anew, or the guest was."""


class Agent:
    """A synchronised conversation with the guest agent. Made by `conversation`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def synchronise(self, *, timeout: float) -> None:
        """Wait until the agent answers, at most `timeout` seconds. Raises `GuestFailed`.

        QEMU keeps the request until the agent opens its port, so the answer comes as soon as the guest has booted.
        """
        sent: list[int] = []
        answered = 0
        try:
            async with asyncio.timeout(timeout):
                while not answered:
                    sent.append(LEAST_SYNC + secrets.randbits(48))
                    # The 0xFF makes the agent's parser drop what a client before us left unfinished.
                    self._writer.write(b"\xff" + _request("guest-sync-delimited", {"id": sent[-1]}))
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(SYNC_AGAIN):
                            answered = await self._wait_for_sync(sent)
                # A guest that was paused answers each of them, and before each tells an error about the 0xFF.
                while answered != sent[-1]:
                    answered = await self._wait_for_sync(sent)
        except TimeoutError:
            raise _silent(f"in {timeout:g} s") from None
        except (asyncio.IncompleteReadError, OSError) as error:
            raise _gone() from error

    async def _wait_for_sync(self, sent: Sequence[int]) -> int:
        """The number of the next answer to one of them."""
        while True:
            await self._reader.readuntil(b"\xff")
            line = await self._reader.readline()
            if not line:
                raise asyncio.IncompleteReadError(b"", None)
            with contextlib.suppress(msgspec.DecodeError):
                number = msgspec.json.decode(line).get("return")
                if number in sent:
                    return int(number)

    async def call(self, command: str, *, timeout: float = 20.0, **arguments: Any) -> Any:
        """One command. An underscore in an argument's name stands for a hyphen. Raises `GuestFailed`."""
        self._send(command, arguments)
        return await self._reply(command, timeout=timeout)

    def _send(self, command: str, arguments: dict[str, Any]) -> None:
        given = {name.replace("_", "-"): value for name, value in arguments.items() if value is not None}
        self._writer.write(_request(command, given))

    async def _reply(self, command: str, *, timeout: float) -> Any:
        try:
            async with asyncio.timeout(timeout):
                await self._writer.drain()
                reply = msgspec.json.decode(await self._reader.readuntil(b"\n"))
        except TimeoutError:
            raise _silent(f"{command} in {timeout:g} s") from None
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, msgspec.DecodeError) as error:
            raise _gone() from error
        if "error" in reply:
            said = str(reply["error"].get("desc", reply["error"]))
            raise Refused(f"the guest agent refused {command}", said)
        return reply.get("return")

    async def ping(self, *, timeout: float = 5.0) -> None:
        await self.call("guest-ping", timeout=timeout)

    async def start(
        self,
        path: str,
        arguments: Sequence[str] = (),
        *,
        env: Sequence[str] | None = None,
        stdin: bytes | None = None,
        capture: bool = False,
    ) -> int:
        """Start a program in the guest and give its pid. `env` (NAME=VALUE) replaces the agent's environment."""
        reply = await self.call(
            "guest-exec",
            path=path,
            arg=list(arguments),
            env=None if env is None else list(env),
            input_data=None if stdin is None else base64.b64encode(stdin).decode(),
            capture_output=capture or None,
        )
        return int(reply["pid"])

    async def status(self, pid: int) -> ExecStatus:
        """Whether a started program has ended, and how; asking after its end makes the agent forget it.

        Raises `UnknownProcess` when the agent never knew it or has forgotten it.
        """
        (status,) = await self.statuses(pid)
        if status is None:
            raise UnknownProcess(f"the guest agent doesn't know process {pid}")
        return status

    async def statuses(self, *pids: int) -> list[ExecStatus | None]:
        """The same for several in one go; None for one that the agent doesn't know."""
        for pid in pids:
            self._send("guest-exec-status", {"pid": pid})
        found: list[ExecStatus | None] = []
        for _ in pids:
            try:
                found.append(_status(await self._reply("guest-exec-status", timeout=STATUS_TIME)))
            except Refused:
                found.append(None)
        return found

    async def shutdown(self, mode: Literal["powerdown", "reboot", "halt"]) -> None:
        """Ask the guest to shut down. The agent doesn't answer this one unless it refuses."""
        self._writer.write(_request("guest-shutdown", {"mode": mode}))
        try:
            await self._writer.drain()
            async with asyncio.timeout(0.3):
                reply = msgspec.json.decode(await self._reader.readuntil(b"\n"))
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            return
        if "error" in reply:
            raise GuestFailed("the guest agent refused to shut down", str(reply["error"].get("desc")))

    async def set_time(self, nanoseconds: int | None = None) -> None:
        """Set the guest's clock to nanoseconds since 1970, or from its hardware clock."""
        await self.call("guest-set-time", time=nanoseconds)

    async def interfaces(self) -> list[dict[str, Any]]:
        """The guest's network interfaces with their addresses."""
        return list(await self.call("guest-network-get-interfaces"))

    async def freeze(self) -> int:
        """Freeze the guest's file systems, and tell how many; `thaw` must follow."""
        return int(await self.call("guest-fsfreeze-freeze", timeout=60))

    async def thaw(self) -> int:
        return int(await self.call("guest-fsfreeze-thaw", timeout=60))

    async def frozen(self) -> bool:
        return bool(await self.call("guest-fsfreeze-status") == "frozen")


@contextlib.asynccontextmanager
async def conversation(connection: socket.socket, *, timeout: float = 10.0) -> AsyncIterator[Agent]:
    """Speak with the agent over a connected socket, which is closed at the end.

    `timeout`, in seconds, is how long the agent may take to answer at first. Raises `GuestFailed`.
    """
    reader, writer = await asyncio.open_unix_connection(sock=connection, limit=LONGEST_REPLY)
    try:
        agent = Agent(reader, writer)
        await agent.synchronise(timeout=timeout)
        yield agent
    finally:
        # What a broken-off exchange left unsent is no use to anybody.
        writer.transport.abort()


def _request(command: str, arguments: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"execute": command, "arguments": arguments}) + b"\n"


def _status(reply: dict[str, Any]) -> ExecStatus:
    return ExecStatus(
        exited=reply["exited"],
        exit_code=reply.get("exitcode"),
        signal=reply.get("signal"),
        stdout=base64.b64decode(reply.get("out-data", "")),
        stderr=base64.b64decode(reply.get("err-data", "")),
        # Up to QEMU 10.0 the agent sends these only when output was lost, and then says false.
        truncated="out-truncated" in reply or "err-truncated" in reply,
    )


def _silent(doing: str) -> GuestFailed:
    return GuestFailed(
        f"the guest agent didn't answer {doing}",
        "the guest still boots, is paused, or has no agent",
        "Wait for it with `atoll wait`, or look at `atoll logs` and `atoll console`.",
    )


def _gone() -> GuestFailed:
    return GuestFailed("the connection to the guest agent ended", "QEMU stopped", "See `atoll show` for how it ended.")
