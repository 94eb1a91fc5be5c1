"""Joins the user's terminal with one in the guest: raw mode, resizing, a key that detaches, and a clean way back."""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from atoll.cli.output import write_bytes
from atoll.cli.streams import standard_input
from atoll.errors import InvalidInput

if TYPE_CHECKING:
    from atoll.platform.api import Terminal

DETACH_KEYS = "ctrl-]"
_END_OF_INPUT = b"\x04"


def parse_keys(text: str) -> bytes:
    """The bytes of `ctrl-]`, or of several keys: `ctrl-p,ctrl-q`. Raises `InvalidInput`."""
    found = bytearray()
    for key in text.lower().split(","):
        name = key.removeprefix("ctrl-")
        if key.startswith("ctrl-") and len(name) == 1 and name in "abcdefghijklmnopqrstuvwxyz[\\]^_@":
            found.append(ord(name.upper()) & 0x1F)
        elif len(key) == 1 and key.isascii() and key.isprintable():
            found.append(ord(key))
        else:
            raise InvalidInput(
                f"'{text}' are no keys to detach with", next_step="Write them like ctrl-] or ctrl-p,ctrl-q."
            )
    return bytes(found)


class KeyWatch:
    """Finds the detach keys in what is typed, and holds back what may be their beginning."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""
        self.found = False

    def feed(self, typed: bytes) -> bytes:
        """What is to be sent on; after the keys were found, what stood before them."""
        data = self._held + typed
        before, keys, _ = data.partition(self._keys)
        if keys:
            self._held, self.found = b"", True
            return before
        held = next((size for size in range(len(self._keys) - 1, 0, -1) if data.endswith(self._keys[:size])), 0)
        self._held = data[len(data) - held :]
        return data[: len(data) - held]


async def attach(terminal: "Terminal", *, keys: str, name: str) -> int:
    """Pass both directions on until the other side ends or the keys are typed. The terminal is detached at the end.

    Returns the exit code of the command in it, where the terminal has one.
    """
    watch = KeyWatch(parse_keys(keys))
    interactive = sys.stdin.isatty()
    try:
        with _raw_mode() if interactive else contextlib.nullcontext(), _resized(terminal):
            if interactive:
                # What was typed before went away with the change of modes.
                click.echo(f"Attached to {name}. Type {keys} to detach.\r", err=True)
            await _join(terminal, watch, interactive=interactive)
    finally:
        await terminal.close()
    if interactive:
        click.echo(f"\nDetached from {name}.", err=True)
    code = getattr(terminal, "exit_code", None)
    return code if isinstance(code, int) and not watch.found else 0


async def _join(terminal: "Terminal", watch: KeyWatch, *, interactive: bool) -> None:
    async def show() -> None:
        while data := await terminal.read():
            write_bytes(data)

    async def send() -> None:
        async for typed in standard_input():
            wanted = watch.feed(typed) if interactive else typed
            if wanted:
                await terminal.write(wanted)
            if watch.found:
                return
        # A file or a pipe has ended: say so as a user would, and let what it has set going come to its end.
        await terminal.write(_END_OF_INPUT)
        await showing

    showing = asyncio.ensure_future(show())
    sending = asyncio.ensure_future(send())
    try:
        done, _ = await asyncio.wait((showing, sending), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (showing, sending):
            task.cancel()
        await asyncio.gather(showing, sending, return_exceptions=True)


@contextlib.contextmanager
def _raw_mode() -> Iterator[None]:
    """Every key goes to the guest, Ctrl-C too. However it ends, the terminal is as before."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        # Not TCSADRAIN: it would wait for whoever has stopped the output.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


@contextlib.contextmanager
def _resized(terminal: "Terminal") -> Iterator[None]:
    """Tell the guest the size of our terminal, now and whenever it changes."""
    if not sys.stdout.isatty():
        yield
        return
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def forget(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled():
            # A guest that doesn't know sizes, or is just going away: the wrong size is all that comes of it.
            task.exception()

    def tell() -> None:
        size = os.get_terminal_size(sys.stdout.fileno())
        task = loop.create_task(terminal.resize(rows=size.lines, columns=size.columns))
        tasks.add(task)
        task.add_done_callback(forget)

    tell()
    loop.add_signal_handler(signal.SIGWINCH, tell)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        for task in tasks:
            task.cancel()
