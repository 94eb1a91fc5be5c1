"""Runs a piece of Python against a home in a process of its own, as a command would, and kills it on the way.

tool.run(layout, "await host.create('tiny', name='v')", kill_at=("create", "files", "after"))
tool.run(layout, "await host.networks.exec('lab', ['true'])", kill_at_act=Act(7))
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from atoll.layout import Layout

Point = tuple[str, str, str]
"""A verb, one of its steps, and `before`, `after` or `undo`."""


@dataclass(frozen=True)
class Act:
    """Something that the tool does to the world: a file, a process, a word to QEMU. The first is 1."""

    number: int
    later: float = 0
    """Seconds after it has begun; then a tool that has already ended isn't killed."""


ROOT = Path(__file__).parents[2]
PROGRAM = """
import asyncio, os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from atoll.errors import AtollError, WrongState
from atoll.layout import Layout
from atoll.model.requests import *
from atoll.model.spec import PortSpec
from atoll.operations import engine
from atoll.platform.local import LocalHost
from atoll.qemu.monitor import Monitor

def fault(*point):
    if point == {kill_at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    if point == {fail_at!r}:
        raise WrongState("injected")

async def main():
    root = Path({home!r})
    async with LocalHost(Layout(data=root / "data", cache=root / "cache", run=root / "run")) as host:
{action}

ACTS = ("os.mkdir", "os.rename", "os.remove", "os.kill", "os.fork", "subprocess.Popen", "socket.connect", "qmp")
process, acts = os.getpid(), 0

def act(name, arguments):
    global acts
    if name not in ACTS or os.getpid() != process:
        return
    acts += 1
    if acts == {number} and {later}:
        signal.setitimer(signal.ITIMER_REAL, {later})
    elif acts == {number}:
        os.kill(process, signal.SIGKILL)

def audited(usual):
    async def told(*arguments, **options):
        sys.audit("qmp")
        return await usual(*arguments, **options)
    return told

if {number}:
    sys.addaudithook(act)
    Monitor.execute, Monitor.send_descriptor = audited(Monitor.execute), audited(Monitor.send_descriptor)
engine.fault_point = fault
try:
    asyncio.run(main())
except AtollError as error:
    print(f"{{type(error).__name__}}: {{error.text}}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def spawn(
    layout: Layout,
    action: str,
    *,
    kill_at: Point | None = None,
    fail_at: Point | None = None,
    kill_at_act: Act | None = None,
) -> subprocess.Popen[bytes]:
    """Start `action`, lines of Python that have `host`, in a process of its own."""
    indented = "".join(f"        {line}\n" for line in action.strip().splitlines())
    when = kill_at_act or Act(0)
    program = PROGRAM.format(
        root=str(ROOT),
        home=str(layout.data.parent),
        action=indented,
        kill_at=kill_at,
        fail_at=fail_at,
        number=when.number,
        later=when.later,
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
    )


def run(
    layout: Layout,
    action: str,
    *,
    kill_at: Point | None = None,
    fail_at: Point | None = None,
    kill_at_act: Act | None = None,
    timeout: float = 120,
) -> tuple[int, str]:
    """Run `action` to its end; the exit code (negative when it was killed) and what it said on either stream."""
    process = spawn(layout, action, kill_at=kill_at, fail_at=fail_at, kill_at_act=kill_at_act)
    return result(process, timeout=timeout)


def result(process: subprocess.Popen[bytes], *, timeout: float = 120) -> tuple[int, str]:
    """Wait for a spawned tool."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, (stdout + stderr).decode(errors="replace").strip()
