"""A program in a guest that says what busybox can't: frames made by hand, and UDP. See `guest_net.c`."""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.machines import Machine

_SOURCE = Path(__file__).with_name("guest_net.c")


@cache
def program() -> bytes:
    """Static, for a guest of whatever system."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "guest_net"
        subprocess.run([compiler, "-static", "-O2", "-s", "-o", made, _SOURCE], check=True)
        return made.read_bytes()


async def put_guest_net(vm: Machine) -> None:
    """From now on the guest has the command `guest_net`."""
    result = await vm.exec(["sh", "-c", 'cat >"$0" && chmod +x "$0"', "/usr/bin/guest_net"], stdin=program())
    assert result.exit_code == 0, result.stderr


async def send_frames(vm: Machine, frames: Sequence[bytes], *, count: int = 1, vary: int | None = None) -> None:
    """From its first card; with an offset to `vary` each time with another number in the two bytes there."""
    text = "".join(f"{frame.hex()}\n" for frame in frames).encode()
    words = ["guest_net", "send", "eth0", str(count), *([] if vary is None else [str(vary)])]
    result = await vm.exec(words, stdin=text)
    assert result.exit_code == 0, result.stderr


async def hear_frames(vm: Machine, seconds: int) -> list[bytes]:
    """Those that arrive at its first card."""
    result = await vm.exec(["guest_net", "hear", "eth0", str(seconds)])
    assert result.exit_code == 0, result.stderr
    return [bytes.fromhex(line) for line in result.text.split()]
