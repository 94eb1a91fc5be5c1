"""What a program behind the barriers of a real VM can't do: each attack with all barriers, and with each alone."""

import asyncio
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers.confined import LAYERS, Outcome, Trial
from tests.helpers.machines import Factory
from tests.helpers.root import only_root

from atoll.host import user_network
from atoll.host.kernel import landlock_version
from atoll.model.names import new_id
from atoll.model.units import GIB, MIB

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="attacks go by x86-64 numbers"),
    only_root("victims and attackers are root and other users"),
]
USER = 54321
REPOSITORY = Path(__file__).parent.parent.parent
PAGE = REPOSITORY / "docs/security.md"
REACHED_BY_HELPERS = {"TCP to the host's loopback", "UDP to the host's loopback", "TCP to the host's network"}
"""A guest is kept from the loopback by the filter of frames, before its helper has read anything."""
BEGIN, END = "<!-- attacks -->", "<!-- end of attacks -->"


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


@pytest.fixture(params=[0, USER], ids=["root", "user"])
def victims(request: pytest.FixtureRequest) -> Iterator[Victims]:
    made = Victims(owner=request.param)
    try:
        yield made
    finally:
        made.close()


def attempt(
    victims: Victims,
    filters: tuple[str, ...],
    *,
    layers: tuple[str, ...] = LAYERS,
    namespaces: bool = True,
    helper: Path | None = None,
) -> Outcome:
    trial = Trial(
        vm_id=new_id(), memory=1536 * MIB, disk_size=1 * GIB, disk=str(victims.folder / "own-disk"), layers=layers,
        namespaces=namespaces, helper=str(helper or ""), targets=victims.targets(), filters=filters,
    )  # fmt: skip
    become = ["setpriv", f"--reuid={victims.owner}", f"--regid={victims.owner}", "--clear-groups"]
    finished = subprocess.run(
        [*become, sys.executable, "-m", "tests.helpers.confined"], cwd=REPOSITORY, env=os.environ | {"HOME": "/"},
        input=msgspec.json.encode(trial), capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr.decode(errors="replace")
    return msgspec.json.decode(finished.stdout, type=Outcome)


async def filters_of_a_vm(factory: Factory) -> tuple[str, ...]:
    vm = await factory.run("tiny", memory="128MiB")
    found = await asyncio.to_thread(filters_of, vm.pid)
    await vm.rm(force=True)
    assert len(found) == 2, "ours and QEMU's own"
    return found


async def test_no_attack_succeeds_behind_all_barriers(factory: Factory, victims: Victims) -> None:
    filters = await filters_of_a_vm(factory)
    shut_in = await asyncio.to_thread(attempt, victims, filters)
    # Without subordinate ids an ordinary user has no other user to give; the namespaces do for it.
    assert set(shut_in.missing) <= {"own user", "landlock"}
    assert open_in(shut_in) == []
    if "ATOLL_UPDATE_DOCS" in os.environ and victims.owner == 0:
        alone = [await asyncio.to_thread(attempt, victims, filters, layers=(LAYERS[0], layer)) for layer in LAYERS]
        write_table(shut_in, alone)


async def test_no_attack_succeeds_where_user_namespaces_are_refused(factory: Factory, victims: Victims) -> None:
    filters = await filters_of_a_vm(factory)
    shut_in = await asyncio.to_thread(attempt, victims, filters, namespaces=False)
    assert {"namespaces", "empty root"} <= set(shut_in.missing)
    # It says what it doesn't block: a limit on an ordinary user's processes would count those outside as well.
    assert open_in(shut_in) == (["thread bomb"] if "process limit" in shut_in.missing else [])


async def test_a_network_s_helper_reaches_the_network_and_nothing_else(factory: Factory, victims: Victims) -> None:
    vm = await factory.run("tiny", memory="128MiB")
    pid = user_network.helper_of(factory.layout.vm(vm.id).network_control("net0"))
    assert pid is not None
    filters = await asyncio.to_thread(filters_of, pid)
    assert len(filters) == 2, "ours and slirp4netns's own"
    await vm.rm(force=True)
    workplace = victims.folder / "workplace"
    workplace.mkdir()
    workplace.chmod(0o777)
    shut_in = await asyncio.to_thread(attempt, victims, filters, helper=workplace)
    assert shut_in.missing == ()
    assert set(open_in(shut_in)) == REACHED_BY_HELPERS


def open_in(outcome: Outcome) -> list[str]:
    return [name for name, came_of_it in outcome.blocked.items() if came_of_it == "open"]


def write_table(shut_in: Outcome, alone: list[Outcome]) -> None:
    """Put what came of each attack into the page, with all barriers and with each alone."""
    head = ["attack", "all barriers", *LAYERS]
    rows = [
        [name, shut_in.blocked[name], *("" if each.blocked[name] == "open" else each.blocked[name] for each in alone)]
        for name in shut_in.blocked
    ]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    kernel = f"Linux {os.uname().release}, Landlock {landlock_version()}; as root's VM."
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text("\n".join([f"{before}{BEGIN}", kernel, "", *lines, f"{END}{after}"]))
