"""Things to attack, and attacks on them from behind the barriers of a real program. For tests that root runs."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from atoll.model.names import new_id
from tests.helpers.confined import Outcome, Trial

REPOSITORY = Path(__file__).parent.parent.parent


def filters_of(pid: int) -> tuple[str, ...]:
    """The filters of system calls that a running QEMU has: PTRACE_SECCOMP_GET_FILTER, ptrace(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    attach, detach, get_filter = 16, 17, 0x420C
    assert libc.ptrace(attach, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    try:
        os.waitpid(pid, 0x40000000)
        found = []
        while (length := libc.ptrace(get_filter, pid, len(found), None)) > 0:
            program = ctypes.create_string_buffer(length * 8)
            assert libc.ptrace(get_filter, pid, len(found), program) == length
            found.append(program.raw.hex())
    finally:
        libc.ptrace(detach, pid, None, None)
    return tuple(found)


class Victims:
    """Things of the host and of other VMs, made for the attacks; all can be used by whoever isn't shut in."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.folder = Path(tempfile.mkdtemp(prefix="atoll-test-"))
        self.folder.chmod(0o755)
        for name in ("disk", "memory", "key", "own-disk"):
            (self.folder / name).write_bytes(b"secret of another")
            (self.folder / name).chmod(0o600)
            os.chown(self.folder / name, owner, owner)
        (self.folder / "open").mkdir()
        (self.folder / "open").chmod(0o777)
        become = ["setpriv", f"--reuid={owner}", f"--regid={owner}", "--clear-groups"]
        asleep = "import sys, time; b = b'secret!!'; print(id(b), flush=True); time.sleep(600)"
        self.process = subprocess.Popen([*become, sys.executable, "-c", asleep], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())
        self.sockets = [socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
        for each in self.sockets:
            each.bind(("127.0.0.1", 0))
        self.sockets.append(socket.create_server(("0.0.0.0", 0)))
        self.abstract = f"atoll-test-{new_id()}"
        for where in (f"{self.folder}/control.sock", f"\0{self.abstract}"):
            self.sockets.append(socket.socket(socket.AF_UNIX))
            self.sockets[-1].bind(where)
        (self.folder / "control.sock").chmod(0o777)
        for each in self.sockets:
            if each.type == socket.SOCK_STREAM:
                each.listen(200)

    def targets(self) -> dict[str, Any]:
        ports = [each.getsockname()[1] for each in self.sockets[:3]]
        block = next((f"/dev/{name.name}" for name in Path("/sys/block").iterdir()), "/dev/vda")
        return {
            "disk": f"{self.folder}/disk", "memory_file": f"{self.folder}/memory", "key": f"{self.folder}/key",
            "socket": f"{self.folder}/control.sock", "open_folder": f"{self.folder}/open",
            "victim": self.process.pid, "victim_address": self.address, "abstract": self.abstract,
            "tcp": ports[0], "udp": ports[1], "tcp_any": ports[2], "address": own_address(), "block_device": block,
        }  # fmt: skip

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        for each in self.sockets:
            each.close()
        shutil.rmtree(self.folder)


def own_address() -> str:
    """An address of this computer that isn't loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def try_all(trial: Trial, *, user: int) -> Outcome:
    """All attacks, by somebody who is that user before he is shut in."""
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    finished = subprocess.run(
        [*become, sys.executable, "-m", "tests.helpers.confined"], cwd=REPOSITORY, env=os.environ | {"HOME": "/"},
        input=msgspec.json.encode(trial), capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr.decode(errors="replace")
    return msgspec.json.decode(finished.stdout, type=Outcome)


def open_in(outcome: Outcome) -> list[str]:
    return [name for name, came_of_it in outcome.blocked.items() if came_of_it == "open"]


def write_table(page: Path, name: str, *, above: list[str], rows: list[list[str]]) -> None:
    """Put a table, its head first, between the page's two marks for it."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    before, _, rest = page.read_text().partition(begin)
    after = rest.partition(end)[2]
    page.write_text("\n".join([f"{before}{begin}", *above, "", *lines, f"{end}{after}"]))
