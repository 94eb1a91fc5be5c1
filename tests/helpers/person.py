"""An ordinary user with a home, who runs commands; made and removed by tests that root runs."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import leftovers

USER, STRANGER = 54321, 54322
"""Numbers that nobody has; a user needs no name for this."""
ATOLL = "from atoll.cli.main import main; main()"


class Person:
    """Somebody with a home, who runs commands."""

    def __init__(self, uid: int, home: Path) -> None:
        self.uid = uid
        self.home = home

    @property
    def become(self) -> list[str]:
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]

    def run(self, *argv: str | Path, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ATOLL_"))}
        return subprocess.run(
            [*self.become, *argv],
            input=stdin,
            env=kept | {"HOME": str(self.home)},
            cwd=self.home,
            capture_output=True,
            timeout=300,
            check=False,
        )

    def atoll(self, *words: str, stdin: bytes = b"") -> bytes:
        finished = self.run(sys.executable, "-c", ATOLL, *words, stdin=stdin)
        assert finished.returncode == 0, finished.stderr.decode(errors="replace")
        return finished.stdout


@contextlib.contextmanager
def somebody(uid: int) -> Iterator[Person]:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    home = Path(tempfile.mkdtemp(prefix="atoll-test-"))
    os.chown(home, uid, uid)
    home.chmod(0o755)
    someone = Person(uid, home)
    if someone.run(sys.executable, "-c", "import atoll").returncode != 0:
        shutil.rmtree(home)
        pytest.skip("this checkout is in a folder that only root may enter")
    try:
        yield someone
    finally:
        leftovers.end_processes_of(home)
        shutil.rmtree(home, ignore_errors=True)
