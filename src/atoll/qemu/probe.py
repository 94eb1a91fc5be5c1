"""Asks a real QEMU what it can do, over QMP, without a machine. About 0.1 s; cached by the binary's identity."""

import asyncio
import contextlib
import os
import platform
import signal
import socket
from pathlib import Path
from typing import Any

import msgspec

from atoll.errors import EngineFailed, MissingTool, TimedOut, Unsupported
from atoll.model.launch import Capabilities
from atoll.model.spec import Arch
from atoll.qemu.monitor import Monitor

BINARIES: dict[Arch, str] = {
    "x86_64": "qemu-system-x86_64",
    "aarch64": "qemu-system-aarch64",
    "riscv64": "qemu-system-riscv64",
}
OLDEST = (8, 2, 0)
"""The oldest QEMU that has what the plans use (design.md)."""
ANSWER_TIME = 10.0
"""Seconds in which a QEMU has to greet, and to end when it was told to."""


def host_arch() -> Arch:
    """This machine's architecture. Raises `Unsupported` for one that Atoll has no machine for."""
    known: dict[str, Arch] = {
        "x86_64": "x86_64",
        "amd64": "x86_64",
        "aarch64": "aarch64",
        "arm64": "aarch64",
        "riscv64": "riscv64",
    }
    arch = known.get(platform.machine().lower())
    if arch is None:
        raise Unsupported(f"this is a {platform.machine()} machine", "Atoll has guests for x86_64, aarch64 and riscv64")
    return arch


def identity_of(binary: Path) -> str:
    """Names one build of QEMU: another size or time is another one."""
    status = binary.resolve().stat()
    return f"{binary.resolve()}:{status.st_size}:{status.st_mtime_ns}"


def cached(binary: Path, cache: Path) -> Capabilities | None:
    """What this very binary said before, if it was asked."""
    try:
        capabilities = msgspec.json.decode((cache / f"{binary.name}.json").read_bytes(), type=Capabilities)
    except (OSError, msgspec.DecodeError):
        return None
    return capabilities if capabilities.identity == identity_of(binary) else None


async def probe(binary: Path) -> Capabilities:
    """Ask the binary. Raises `EngineFailed` when it doesn't run, `Unsupported` when it is too old."""
    ours, theirs = socket.socketpair()
    try:
        process = await _started(
            binary, "-nodefaults", "-no-user-config", "-machine", "none", "-display", "none",
            "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control",
            pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        ours.close()
        raise MissingTool(
            f"{binary} can't be run", str(error), "Install QEMU: `sudo apt-get install qemu-system`."
        ) from error
    finally:
        theirs.close()
    try:
        async with Monitor(ours, timeout=ANSWER_TIME) as monitor:
            capabilities = await _ask(monitor, binary)
            await monitor.execute("quit")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), ANSWER_TIME)
    except (EngineFailed, TimedOut) as error:
        await _end(process)
        said = await _last_words(process)
        raise EngineFailed(
            f"{binary} can't be asked what it can do", said or f"{error.what}: {error.why}", "Run `atoll doctor`."
        ) from error
    finally:
        await _end(process)
    if capabilities.version < OLDEST:
        raise Unsupported(
            f"{binary} is version {capabilities.version_text}",
            f"Atoll needs {'.'.join(map(str, OLDEST[:2]))} or newer",
            "Install a newer QEMU (on Debian 12 from the backports suite: `./dev setup`).",
        )
    return capabilities


async def _started(binary: Path, *words: str, **options: Any) -> asyncio.subprocess.Process:
    """A start that is cancelled half-way would leave what a script has started."""
    starting = asyncio.ensure_future(asyncio.create_subprocess_exec(binary, *words, **options))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            await _end(await starting)
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    """With what it started: the binary may be a script around QEMU."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 1)


async def _last_words(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    try:
        said = await asyncio.wait_for(process.stderr.read(), 1)
    except TimeoutError:
        return ""
    return said.decode(errors="replace").strip()[-500:]


async def _ask(monitor: Monitor, binary: Path) -> Capabilities:
    version: dict[str, Any] = await monitor.execute("query-version")
    target: dict[str, Any] = await monitor.execute("query-target")
    machines: list[dict[str, Any]] = await monitor.execute("query-machines")
    types: list[dict[str, Any]] = await monitor.execute("qom-list-types")
    commands: list[dict[str, Any]] = await monitor.execute("query-commands")
    cpus: list[dict[str, Any]] = await monitor.execute("query-cpu-definitions")
    options: list[dict[str, Any]] = await monitor.execute("query-command-line-options")
    number = version["qemu"]
    names = {machine["name"]: machine["name"] for machine in machines}
    names |= {machine["alias"]: machine["name"] for machine in machines if "alias" in machine}
    return Capabilities(
        binary=str(binary),
        identity=identity_of(binary),
        version=(number["major"], number["minor"], number["micro"]),
        package=version.get("package", ""),
        arch=target["arch"],
        machines=names,
        types=frozenset(entry["name"] for entry in types),
        commands=frozenset(entry["name"] for entry in commands),
        cpus=frozenset(entry["name"] for entry in cpus),
        options=frozenset(entry["option"] for entry in options),
    )
