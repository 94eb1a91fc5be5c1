"""The command line with a real guest: streams, exit codes, signals, files."""

import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.helpers.command import ATOLL

pytestmark = pytest.mark.vm


def atoll(*words: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([*ATOLL, *words], input=stdin, capture_output=True, timeout=300, check=False)


async def test_commands_keep_their_streams_and_exit_codes(
    home: Path, with_image: Callable[[str], Awaitable[str]], tmp_path: Path
) -> None:
    await with_image("tiny")
    try:
        ran = atoll(
            "run", "tiny", "--name", "web", "--memory", "256MiB", "--quiet", "--", "sh", "-c", "hostname; exit 9"
        )
        assert (ran.returncode, ran.stdout, ran.stderr) == (9, b"web\n", b"")

        spoken = atoll("exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
        assert (spoken.returncode, spoken.stdout, spoken.stderr) == (7, b"out\n", b"err\n")

        binary = os.urandom(1_000_000)
        assert atoll("exec", "-i", "web", "cat", stdin=binary).stdout == binary

        placed = atoll("exec", "-e", "A=b c", "-w", "/tmp", "web", "--", "sh", "-c", 'echo "$A"; pwd')
        assert placed.stdout == b"b c\n/tmp\n"

        assert atoll("exec", "web", "no-such-program").returncode == 127
        assert atoll("exec", "web", "/etc/passwd").returncode == 126
        assert atoll("exec", "web", "--", "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
        late = atoll("exec", "--timeout", "500ms", "web", "sleep", "60")
        assert (late.returncode, late.stdout) == (125, b"")

        (tmp_path / "file").write_bytes(binary)
        assert atoll("cp", "--quiet", str(tmp_path / "file"), "web:/root/copy").returncode == 0
        assert atoll("cp", "web:/root/copy", "-").stdout == binary
        assert atoll("cp", "-", "web:/root/typed", stdin=b"typed").returncode == 0
        assert atoll("cp", "web:/root/typed", "-").stdout == b"typed"

        shell = atoll("shell", "web", stdin=b"cat /root/typed; exit 4\n")
        assert shell.returncode == 4
        assert b"typed" in shell.stdout
    finally:
        assert atoll("rm", "--force", "web").returncode == 0


async def test_ctrl_c_undoes_a_run_and_kills_a_command(home: Path, with_image: Callable[[str], Awaitable[str]]) -> None:
    await with_image("tiny")
    # With a shell in the place of init it is never ready; after two seconds a line says that it is waited for.
    never_ready = [*ATOLL, "run", "tiny", "--name", "gone", "--cmdline", "rdinit=/bin/sh"]
    process = subprocess.Popen(never_ready, stderr=subprocess.PIPE)
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 130, first + rest
    assert b"undone" in rest
    assert atoll("ls", "-q").stdout == b""

    kept = atoll("run", "--rm", "tiny", "--", "sh", "-c", "exit 3")
    assert kept.returncode == 3
    assert atoll("ls", "-q").stdout == b""
