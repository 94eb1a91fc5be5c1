"""Terminals: a shell in the guest on a virtio console of its own, and the guest's serial line."""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from atoll.errors import AtollError, Busy, GuestFailed, Unsupported
from atoll.host.files import locked
from atoll.layout import VmPaths
from atoll.model.vm import ExecRequest, ExecResult
from atoll.operations import guest_scripts
from atoll.operations.guest_agent import connect, exchange
from atoll.operations.guest_capture import collected
from atoll.operations.guest_exec import execute
from atoll.operations.guest_slot import SH

CHUNK = 64 << 10
TTYS = (1, 2, 0)
"""hvc0 comes last: systemd puts a getty on it by itself."""

NO_TTY = 96
HANG_UP = 3.0
"""Seconds that a shell has to end itself after the hang-up."""

# A session leader without a terminal gets the first one that it opens as its controlling terminal (credentials(7)).
# Its size is set with the terminal open, since the last close forgets it.
# What an earlier user left on the terminal has nobody any more, since we hold the lock.
_TERMINAL = """
t=/dev/hvc$1 mark=$2 term=$3
shift 3
[ -c "$t" ] || exit 96
for f in /proc/[0-9]*/fd/0; do
    if [ "$f" -ef "$t" ]; then pid=${f#/proc/}; kill -9 "${pid%%/*}"; fi
done 2>/dev/null
export TERM="$term"
exec setsid sh -c '
    t=$1 mark=$2
    shift 2
    exec <"$t" >"$t" 2>&1
    stty sane rows 24 cols 80
    printf "\\\\036%s\\\\036" "$mark"
    exec "$@"
' sh "$t" "$mark" "$@"
"""

_HANG_UP = """
for f in /proc/[0-9]*/fd/0; do
    if [ "$f" -ef "/dev/hvc$1" ]; then pid=${f#/proc/}; kill -HUP "${pid%%/*}"; kill -CONT "${pid%%/*}"; fi
done 2>/dev/null
"""


class Shell:
    """A terminal in the guest with a program on it (`platform.api.Terminal`)."""

    def __init__(self, *, paths: VmPaths, name: str, number: int, held: ExitStack) -> None:
        self._paths = paths
        self._name = name
        self._number = number
        self._held = held
        self._socket = held.enter_context(contextlib.closing(connect(paths, name, f"tty{number}")))
        self._program: asyncio.Task[ExecResult] | None = None
        self._begun = b""

    async def start(self, command: Sequence[str], *, user: str | None, term: str) -> None:
        """Start the program; what an earlier one wrote last is thrown away."""
        mark = secrets.token_hex(16)
        words = list(command) or ["su", "-l", user or "root"]
        if command and user:
            words = guest_scripts.command_of(ExecRequest(argv=tuple(command), user=user))
        request = ExecRequest(argv=(SH, "-c", _TERMINAL, "sh", str(self._number), mark, term, *words))
        self._program = asyncio.create_task(execute(self._paths, self._name, request))
        seen = b""
        sign = f"\x1e{mark}\x1e".encode()
        while sign not in seen:
            data = await self._receive()
            if not data:
                raise self._refused()
            seen = seen[-len(sign) :] + data
        self._begun = seen.split(sign, 1)[1]

    def _refused(self) -> AtollError:
        assert self._program is not None
        result = self._program.result()
        if result.exit_code == NO_TTY:
            return Unsupported(f"{self._name}: the guest has no virtio console", next_step="Use `atoll console`.")
        said = result.stderr.decode(errors="replace").strip()
        return GuestFailed(f"{self._name}: the shell didn't start", said or f"exit code {result.exit_code}")

    async def read(self) -> bytes:
        """The next bytes, or `b""` when the program has ended. Raises `GuestFailed` when the guest goes away."""
        if self._begun:
            data, self._begun = self._begun, b""
            return data
        data = await self._receive()
        if not data and self._program is not None:
            self._program.result()
        return data

    async def _receive(self) -> bytes:
        """Bytes, or none when the program has ended and all that it wrote was received."""
        assert self._program is not None
        receiving = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(self._socket, CHUNK))
        try:
            await asyncio.wait({receiving, self._program}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                # Its last words come by another way than the news of its end.
                await asyncio.wait({receiving}, timeout=0.05)
            return receiving.result() if receiving.done() else b""
        finally:
            receiving.cancel()

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def resize(self, *, rows: int, columns: int) -> None:
        """Tell the program the terminal's size, by SIGWINCH. Raises `GuestFailed`."""
        stty = 'stty -F "/dev/hvc$1" rows "$2" cols "$3"'
        await self._do(stty, str(rows), str(columns))

    @property
    def exit_code(self) -> int | None:
        """The program's exit code when it has ended."""
        if self._program is None or not self._program.done() or self._program.cancelled():
            return None
        return None if self._program.exception() else self._program.result().exit_code

    async def close(self) -> None:
        """Hang up, and free the terminal. A program that doesn't mind a hang-up is killed."""
        try:
            if self._program is not None and not self._program.done():
                with contextlib.suppress(AtollError):
                    await self._do(_HANG_UP)
                await asyncio.wait({self._program}, timeout=HANG_UP)
        finally:
            with self._held:
                if self._program is not None:
                    self._program.cancel()
                    await asyncio.gather(self._program, return_exceptions=True)

    async def _do(self, script: str, *arguments: str) -> None:
        async with exchange(self._paths, self._name) as agent:
            pid = await agent.start(SH, ["-c", script, "sh", str(self._number), *arguments])
        await collected(self._paths, self._name, pid)


async def open_shell(
    paths: VmPaths, name: str, *, command: Sequence[str] = (), user: str | None = None, term: str = "xterm-256color"
) -> Shell:
    """A terminal with a login shell of `user` (root), or with `command`, in it; `close` it at the end.

    Raises `Busy` when all terminals are in use, `Unsupported` in a guest that has none, `GuestFailed`.
    """
    with ExitStack() as held:
        for number in TTYS:
            there = paths.socket(f"tty{number}").exists()
            if there and held.enter_context(locked(paths.lock(f"tty{number}"), wait=False)):
                break
        else:
            raise Busy(f"{name}: all its terminals are in use", next_step="Close a shell, or use `atoll exec`.")
        shell = Shell(paths=paths, name=name, number=number, held=held.pop_all())
    try:
        await shell.start(command, user=user, term=term)
    except BaseException:
        await shell.close()
        raise
    return shell


class Console:
    """The guest's serial line (`platform.api.Terminal`)."""

    def __init__(self, connection: socket.socket, held: ExitStack) -> None:
        self._socket = connection
        self._held = held

    async def read(self) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(self._socket, CHUNK)
        except ConnectionResetError:
            return b""

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def resize(self, *, rows: int, columns: int) -> None:
        """A serial line has no size."""

    async def close(self) -> None:
        """Detach; the guest doesn't notice."""
        self._held.close()


async def open_console(paths: VmPaths, name: str) -> Console:
    """The serial line, to oneself until `close`. Raises `Busy` when another console has it, `GuestFailed`."""
    with ExitStack() as held:
        if not held.enter_context(locked(paths.lock("console"), wait=False)):
            raise Busy(
                f"{name}: its console is in use",
                next_step=f"Detach there first, or read it with `atoll logs -f {name}`.",
            )
        connection = held.enter_context(contextlib.closing(connect(paths, name, "serial")))
        return Console(connection, held.pop_all())
