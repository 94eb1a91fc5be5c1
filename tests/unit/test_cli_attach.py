"""Joining a terminal: a real one (a pty) on our side, and on the other side a guest that answers in capitals."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

GUEST = '''
import asyncio, sys
from atoll.cli.attach import attach
from atoll.cli.session import cancelled_by_signals

class Capitals:
    """Answers in capitals; "bye" ends it with exit code 3, "boom" breaks it."""
    exit_code = None
    def __init__(self):
        self.said = asyncio.Queue()
    async def read(self):
        return await self.said.get()
    async def write(self, data):
        if b"boom" in data:
            raise RuntimeError("boom")
        if b"bye" in data:
            self.exit_code = 3
            await self.said.put(b"")
        await self.said.put(data.upper())
    async def resize(self, *, rows, columns):
        await self.said.put(b"<%d by %d>" % (rows, columns))
    async def close(self):
        print("closed", file=sys.stderr, flush=True)

async def main():
    with cancelled_by_signals() as received:
        try:
            return await attach(Capitals(), keys=sys.argv[1], name="web")
        except asyncio.CancelledError:
            return 128 + received[0]

sys.exit(asyncio.run(main()))
'''


class Session:
    """A user at a pty; everything that the terminal shows is in `seen`."""

    def __init__(self, keys: str = "ctrl-]") -> None:
        self.master, slave = os.openpty()
        self.size(24, 80)
        self.before = termios.tcgetattr(self.master)
        self.seen = b""
        self.news = threading.Condition()
        # The pty is its controlling terminal, so that the kernel tells it new sizes.
        self.process = subprocess.Popen(
            [sys.executable, "-c", GUEST, keys],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )
        os.close(slave)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            with self.news:
                self.seen += data
                self.news.notify_all()

    def size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def sees(self, text: bytes) -> None:
        with self.news:
            assert self.news.wait_for(lambda: text in self.seen, timeout=30), self.seen

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.master)[3] & termios.ECHO

    def end(self) -> int:
        code = self.process.wait(timeout=30)
        assert termios.tcgetattr(self.master) == self.before, "the terminal isn't as it was"
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join(timeout=10)
        os.close(self.master)


@pytest.fixture
def session() -> Iterator[Session]:
    opened = Session()
    yield opened
    opened.close()


def test_what_is_typed_goes_there_and_back_and_sizes_follow(session: Session) -> None:
    session.sees(b"Type ctrl-] to detach")
    session.sees(b"<24 by 80>")
    assert session.raw
    for word in (b"one", b"two", b"three"):
        session.type(word)
        session.sees(word.upper())
    session.size(50, 100)
    session.sees(b"<50 by 100>")
    session.type(b"\x03\x04 ctrl-c goes there")
    session.sees(b"CTRL-C GOES THERE")
    session.type(b"\x1d")
    assert session.end() == 0
    session.sees(b"closed")


def test_the_exit_code_of_what_ended_there_is_ours(session: Session) -> None:
    session.sees(b"detach")
    session.type(b"bye")
    assert session.end() == 3


def test_the_terminal_is_as_before_whatever_ends_it(session: Session) -> None:
    session.sees(b"detach")
    session.type(b"boom")
    assert session.end() == 1
    session.sees(b"closed")


def test_sigterm_detaches_cleanly(session: Session) -> None:
    session.sees(b"detach")
    session.process.send_signal(signal.SIGTERM)
    assert session.end() == 128 + signal.SIGTERM
    session.sees(b"closed")


def test_a_script_on_standard_input_is_passed_on_with_its_end(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"line\x1d\nbye")
    for source in (script.open("rb"), subprocess.Popen(["cat", script], stdout=subprocess.PIPE).stdout):
        assert source is not None
        with source:
            done = subprocess.run(
                [sys.executable, "-c", GUEST, "ctrl-]"], stdin=source, capture_output=True, timeout=30, check=False
            )
        assert done.returncode == 3
        assert done.stderr == b"closed\n"
