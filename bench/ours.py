"""Atoll's side: its command, each time a whole process, and its SDK."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.layout import Layout, find
from bench.harness import timed

NAME = "bench"
TWIN = "bench-by-hand"
"""A VM like it, whose command line is started by hand; so both can run at once, and no disk is shared."""
MEMORY = "512MiB"


@dataclass(frozen=True)
class Atoll:
    """Atoll with a home of its own, so that the measurements meet no VM of the user's."""

    home: Path

    @property
    def env(self) -> dict[str, str]:
        # As it is for a user: Python may keep what it compiled.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, "ATOLL_HOME": str(self.home)}

    @property
    def command(self) -> str:
        return str(Path(sys.executable).with_name("atoll"))

    @property
    def layout(self) -> Layout:
        return find({"ATOLL_HOME": str(self.home)})

    def run(self, *words: str) -> str:
        """A command's output. Raises `CalledProcessError`."""
        argv = [self.command, *words]
        finished = subprocess.run(
            argv, env=self.env, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=1800
        )
        return finished.stdout.decode()

    def timed(self, *words: str) -> float:
        """Seconds that the command takes as a whole process."""
        return timed([self.command, *words], env=self.env)

    def prepare(self) -> dict[str, Any]:
        """The tiny image, and two VMs of it. Returns the image as `image show` tells it."""
        self.run("image", "build", "tiny")
        for name in (NAME, TWIN):
            self.run("create", "tiny", "--name", name, "--memory", MEMORY)
        found: dict[str, Any] = json.loads(self.run("image", "show", "tiny", "--format", "json"))
        return found

    def start(self) -> float:
        """Seconds until `start` returns, with the guest running."""
        try:
            return self.timed("start", NAME)
        finally:
            self.run("stop", "--force", NAME)

    def start_unconfined(self) -> float:
        """The same with no barrier around QEMU."""
        self.run("set", NAME, "--isolation", "none")
        try:
            return self.start()
        finally:
            self.run("set", NAME, "--isolation", "standard")

    def ready(self) -> float:
        """Seconds until `start --wait` returns: the guest answers."""
        try:
            return self.timed("start", "--wait", NAME)
        finally:
            self.run("stop", "--force", NAME)

    @contextlib.contextmanager
    def booted(self, name: str = NAME) -> Iterator[None]:
        """The VM, up."""
        self.run("start", "--wait", name)
        try:
            self.run("exec", name, "--", "true")  # the first one loads the program
            yield
        finally:
            self.run("stop", "--force", name)

    def exec_true(self) -> float:
        """Seconds of a whole `atoll exec`."""
        return self.timed("exec", NAME, "--", "true")

    def ls(self) -> float:
        """Seconds of a whole `atoll ls`."""
        return self.timed("ls", "--format", "json")

    def resident(self) -> float:
        """Processes that have this home in their environment and aren't QEMU: how many of ours stay beside a VM.

        The helper of its network isn't ours, and has another environment.
        """
        own = f"ATOLL_HOME={self.home}".encode()
        count = 0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = own in (process / "environ").read_bytes().split(b"\0")
                count += ours and not (process / "exe").readlink().name.startswith("qemu-")
        return count

    def sdk(self, *words: str) -> str:
        """What `python -m bench.sdk` prints for these arguments."""
        argv = [sys.executable, "-m", "bench.sdk", *words]
        finished = subprocess.run(argv, env=self.env, check=True, capture_output=True, timeout=3600)
        return finished.stdout.decode()
