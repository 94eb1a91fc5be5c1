"""The command `atoll` in processes of its own, as a user runs it."""

import subprocess
import sys
from collections.abc import Iterable
from typing import NamedTuple

ATOLL = [sys.executable, "-c", "from atoll.cli.main import main; main()"]


class Ended(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def atoll(*words: str, stdin: bytes = b"", timeout: float = 300) -> Ended:
    """Run `atoll WORDS` to its end."""
    done = subprocess.run([*ATOLL, *words], input=stdin, capture_output=True, timeout=timeout, check=False)
    return Ended(done.returncode, _text(done.stdout), _text(done.stderr))


def all_at_once(commands: Iterable[Iterable[str]], *, timeout: float = 300) -> list[Ended]:
    """Start every command before the first one can have ended, and wait for all."""
    processes = [
        subprocess.Popen([*ATOLL, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for words in commands
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        Ended(process.returncode, _text(out), _text(err)) for process, (out, err) in zip(processes, said, strict=True)
    ]


def _text(said: bytes) -> str:
    return said.decode(errors="replace")
