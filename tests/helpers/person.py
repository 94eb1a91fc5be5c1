"""An ordinary user with a home, who runs commands; made and removed by tests that root runs."""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import leftovers
from tests.helpers.root import need_root

USER, STRANGER = 54321, 54322
"""Numbers that nobody has; a user needs no name for this."""
WITH_IDS = 1001
"""The first user that computers have, whom /etc/subuid gives others as a rule."""
ATOLL = "from atoll.cli.main import main; main()"


class Person:
    """Somebody with a home, who runs commands."""

    def __init__(self, uid: int, home: Path) -> None:
        self.uid = uid
        self.home = home
        self.environment: dict[str, str] = {}

    @property
    def become(self) -> list[str]:
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]

    def run(self, *argv: str | Path, stdin: bytes = b"", timeout: float = 300) -> "subprocess.CompletedProcess[bytes]":
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ATOLL_"))}
        return subprocess.run(
            [*self.become, *argv],
            input=stdin,
            env=kept | {"HOME": str(self.home)} | self.environment,
            cwd=self.home,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def refused(self, *words: str) -> str:
        """What a command that fails says."""
        finished = self.run(sys.executable, "-c", ATOLL, *words)
        assert finished.returncode != 0, finished.stdout.decode(errors="replace")
        return finished.stderr.decode(errors="replace")

    def atoll(self, *words: str, stdin: bytes = b"") -> bytes:
        finished = self.run(sys.executable, "-c", ATOLL, *words, stdin=stdin)
        assert finished.returncode == 0, finished.stderr.decode(errors="replace")
        return finished.stdout


@contextlib.contextmanager
def somebody(uid: int) -> Iterator[Person]:
    need_root("it becomes other users")
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


def subordinate_of(uid: int) -> set[int] | range:
    """The users that this one may give to its programs; else that user itself."""
    found = subordinate_ids(uid)
    if not found and uid != USER:
        pytest.skip("this computer has no such user")
    return found or {uid}


def subordinate_ids(uid: int) -> range:
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(uid).pw_name
        for line in Path("/etc/subuid").read_text().splitlines():
            owner, first, count = line.split(":")
            if owner == name:
                return range(int(first), int(first) + int(count))
    return range(0)
