"""What only root can do: such a test is skipped as an ordinary user, who is told."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import leftovers


def only_root(why: str) -> pytest.MarkDecorator:
    """Marks a test, or all of a module."""
    return pytest.mark.skipif(os.geteuid() != 0, reason=_takes_root(why))


def need_root(why: str) -> None:
    """The same within a fixture."""
    if os.geteuid() != 0:
        pytest.skip(_takes_root(why))


def _takes_root(why: str) -> str:
    return f"takes root: {why}"


@contextlib.contextmanager
def small_file_system(folder: Path, *, size: str, mode: str = "755") -> Iterator[Path]:
    """The folder is a file system of its own meanwhile, which can be filled, and made read-only."""
    need_root("a file system is mounted")
    options = f"size={size},mode={mode}"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if mount.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        leftovers.end_processes_of(folder)
        subprocess.run(["umount", "--lazy", folder], check=True)
