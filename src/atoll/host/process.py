"""The one way to run a program: argv in, bytes out, a pasteable command in the error, nothing left behind."""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.errors import MissingTool, ProcessFailed

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for a program that is interrupted."""
LONGEST_LINE = 1 << 16
"""Bytes after which a line of standard error is told though it hasn't ended."""

# Debian's package for each program that we may run, for the hint in the error.
PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-riscv64": "qemu-system-misc",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "objcopy": "binutils",
    "dpkg-deb": "dpkg",
    "zstd": "zstd",
    "newuidmap": "uidmap",
    "newgidmap": "uidmap",
    "slirp4netns": "slirp4netns",
    "dnsmasq": "dnsmasq-base",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "sftp-server": "openssh-sftp-server",
}


@dataclass(frozen=True)
class Finished:
    """A program that ended."""

    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")


_ELSEWHERE = "/usr/sbin:/sbin:/usr/local/sbin:/usr/lib/openssh:/usr/libexec/openssh:/usr/lib/ssh:/usr/libexec"
"""System folders that an ordinary user's PATH lacks, and those in which distributions have the SFTP server."""


def find(program: str) -> str:
    """The program's path, also from folders that aren't in PATH. Raises `MissingTool`."""
    path = shutil.which(program) or shutil.which(program, path=_ELSEWHERE)
    if path is None and "/" in program:
        raise MissingTool(f"{program} can't be run", "there is no such program")
    if path is None:
        package = PACKAGES.get(program, program)
        raise MissingTool(f"{program} is not installed", next_step=f"Install it: `sudo apt-get install {package}`.")
    return path


async def run(
    argv: Sequence[str | Path],
    *,
    stdin: bytes | int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    check: bool = True,
    on_line: Callable[[str], None] | None = None,
    on_output: Callable[[bytes], None] | None = None,
) -> Finished:
    """Run a program to its end. Raises `ProcessFailed` on a non-zero exit if `check`, `MissingTool` if it isn't there.

    `stdin` is what the program reads, or a descriptor that it gets. `on_line` gets each line of standard error as it
    comes, `on_output` what comes on standard output. When the caller is cancelled, the program and what it started get
    SIGTERM, then SIGKILL.
    """
    words = [find(str(argv[0])), *(str(word) for word in argv[1:])]
    try:
        process = await _started(
            words,
            stdin=stdin if isinstance(stdin, int) else DEVNULL if stdin is None else PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except OSError as error:
        again = _cut(f"To see it again: {pasteable(words, env=env, cwd=cwd)}", 2000)
        raise ProcessFailed(f"{Path(words[0]).name} can't be started", str(error), again) from error
    async with _ended_with_us(process):
        finished = await _communicate(process, stdin=stdin, on_line=on_line, on_output=on_output)
    if check and finished.exit_code != 0:
        raise failure(words, finished, env=env, cwd=cwd)
    return finished


def pasteable(argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """The program as a line for a shell."""
    settings = ["env", *(f"{name}={value}" for name, value in env.items())] if env else []
    line = shlex.join([*settings, *argv])
    return line if cwd is None else f"cd {shlex.quote(str(cwd))} && {line}"


def failure(
    argv: Sequence[str], finished: Finished, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> ProcessFailed:
    """The error of a program that failed: its last lines, and a command to paste."""
    lines = (finished.stderr or finished.stdout)[-LONGEST_LINE:].decode(errors="replace").strip().splitlines()
    said = "; ".join(_cut(line.strip(), 500) for line in lines[-4:]) or "it said nothing"
    how = f"exit code {finished.exit_code}" if finished.exit_code >= 0 else f"signal {-finished.exit_code}"
    again = f"To see it again: {pasteable(argv, env=env, cwd=cwd)}"
    return ProcessFailed(f"{Path(argv[0]).name} failed ({how})", said, again)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


async def _started(words: Sequence[str], **options: Any) -> asyncio.subprocess.Process:
    """A start is never broken off half-way: asyncio would end the program, then wait for its children."""
    starting = asyncio.ensure_future(asyncio.create_subprocess_exec(*words, **options))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            async with _ended_with_us(await starting):
                raise
        raise


@contextlib.asynccontextmanager
async def _ended_with_us(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    """When what is inside is broken off, the program's whole group ends: its children may outlive it, or not listen."""
    try:
        yield
    except BaseException:
        _signal_group(process.pid, signal.SIGTERM)
        try:
            await _wait(process)
        finally:
            # Also when a second cancel cuts the wait short.
            _signal_group(process.pid, signal.SIGKILL)
        await _wait(process)
        raise


async def _wait(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), GRACE)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


async def _communicate(
    process: asyncio.subprocess.Process,
    *,
    stdin: bytes | int | None,
    on_line: Callable[[str], None] | None,
    on_output: Callable[[bytes], None] | None,
) -> Finished:
    async def output() -> bytes:
        assert process.stdout is not None
        if on_output is None:
            return await process.stdout.read()
        kept: list[bytes] = []
        while chunk := await process.stdout.read(1 << 16):
            kept.append(chunk)
            on_output(chunk)
        return b"".join(kept)

    async def errors() -> bytes:
        assert process.stderr is not None
        if on_line is None:
            return await process.stderr.read()
        kept: deque[bytes] = deque(maxlen=200)
        pending = b""
        while chunk := await process.stderr.read(1 << 16):
            *lines, pending = (pending + chunk).split(b"\n")
            if len(pending) >= LONGEST_LINE:
                lines, pending = [*lines, pending], b""
            for line in lines:
                kept.append(line)
                on_line(line.decode(errors="replace").rstrip())
        if pending:
            kept.append(pending)
            on_line(pending.decode(errors="replace").rstrip())
        return b"\n".join(kept)

    async def feed() -> None:
        if not isinstance(stdin, bytes) or process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(stdin)
            await process.stdin.drain()
        process.stdin.close()

    stdout, stderr, _ = await asyncio.gather(output(), errors(), feed())
    return Finished(exit_code=await process.wait(), stdout=stdout, stderr=stderr)
