"""An ordinary user, without root at any step: the same commands, in folders of that user's own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers import leftovers
from tests.helpers.person import ATOLL, STRANGER, USER, WITH_IDS, Person, somebody, subordinate_ids, subordinate_of
from tests.helpers.ports import free_port

from atoll.host import process

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

CHECKOUT = Path(__file__).parents[2]
MANY_THREADS = "import threading; e = threading.Event(); [threading.Thread(target=e.wait).start() for _ in range(400)]"
"""What a desktop has, and more than a VM may have."""
BROAD = (
    "unit",
    "vm/test_verbs_life.py",
    "vm/test_networks.py",
    "vm/test_history.py",
    "vm/test_shares.py",
    "vm/test_supervision.py",
    "vm/test_agent_watched.py",
    "vm/test_api_document.py",
    "vm/test_api_hostile.py",
    "vm/test_api_limits.py",
    "vm/test_api_lists.py",
    "vm/test_api_matching.py",
    "vm/test_reach.py",
    "vm/test_transfers.py",
)
"""What of the suite is run as an ordinary user too, each time that all of it is run."""


@pytest.fixture
def person() -> Iterator[Person]:
    with somebody(USER) as someone:
        yield someone


@contextlib.contextmanager
def busy(person: Person) -> Iterator[None]:
    """Somebody who has many other things running."""
    others = subprocess.Popen([*person.become, sys.executable, "-c", MANY_THREADS])
    try:
        yield
    finally:
        others.kill()
        others.wait()


def owners(pid: str) -> set[str]:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    return set(line.split()[1:])


def networks_work(person: Person) -> None:
    """A network of two machines that leads out, without a privilege."""
    words = ("net", "create", "office", "--mode", "bridge", "--bridge", "br0")
    assert b"networks of mode bridge are root's" in person.run(sys.executable, "-c", ATOLL, *words).stderr
    person.atoll("net", "create", "lab", "--mode", "nat", "--subnet", "10.99.1.0/24")
    person.atoll("run", "tiny", "--name", "other", "--memory", "96MiB", "--network", "lab", "--quiet")
    port = free_port()
    person.atoll("port", "add", "other", f"{port}:80")
    person.atoll("exec", "other", "--", "sh", "-c", "mkdir /www; echo served >/www/index.html; httpd -h /www")
    assert b"10.99.1.3" in person.atoll("net", "attach", "mine", "lab")
    found = b"for i in $(seq 100); do ping -c 1 -W 1 other.lab.atoll && exit 0; sleep 0.1; done; exit 1"
    person.atoll("exec", "mine", "--", "sh", "-c", found.decode())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        assert answer.read() == b"served\n"
    program = "import urllib.request; print(urllib.request.urlopen('http://other/', timeout=10).read())"
    assert person.atoll("net", "exec", "lab", "--", sys.executable, "-c", program) == b"b'served\\n'\n"
    person.atoll("exec", "other", "--", "sh", "-c", "ping 10.99.1.1 >/dev/null 2>&1 &")
    assert b"captured: 3 packets" in person.atoll("net", "capture", "other", "-c", "3", "-w", "captured")
    person.atoll("net", "impair", "other", "--delay", "150ms")
    person.atoll("exec", "mine", "--", "sh", "-c", "ping -c 3 -W 5 other | grep -Eq 'time=([3-9]..|....+)\\.'")
    person.atoll("net", "impair", "other", "--clear")
    person.atoll("net", "group", "create", "web", "--rule", "allow in tcp 80 from label:role=mine")
    person.atoll("net", "set", "other", "--group", "web", "--limit", "10Mbit")
    fetch = ["exec", "mine", "--", "sh", "-c", "printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 2 other 80"]
    assert b"served" not in person.run(sys.executable, "-c", ATOLL, *fetch).stdout
    person.atoll("set", "mine", "--label", "role=mine")
    assert b"served" in person.atoll(*fetch)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        assert answer.read() == b"served\n", "a published port leads in still"
    # Whoever waits for the dead may take its time, hence the states.
    look = ["pgrep", "-a", "-u", str(USER), "-r", "DRS", "-f", "atoll-network|atoll-relay|dnsmasq|slirp4netns .* up0"]
    pids = person.run(*look).stdout.splitlines()
    assert len(pids) == 6, "a holder, two of dnsmasq with what starts them again, the uplink"
    person.atoll("net", "detach", "mine", "lab")
    person.atoll("rm", "--force", "other")
    person.atoll("net", "rm", "lab")
    assert person.run(*look).stdout == b"", "nothing of it is left"


def test_everything_works_without_root(person: Person) -> None:
    data = person.home / ".local/share/atoll"
    person.atoll("image", "build", "tiny", "--quiet")
    with busy(person):
        person.atoll("run", "tiny", "--name", "mine", "--memory", "128MiB", "--quiet")
    try:
        assert person.atoll("exec", "mine", "--", "uname", "-s") == b"Linux\n"
        (person.home / "file").write_bytes(b"from the user")
        person.atoll("cp", "--quiet", str(person.home / "file"), "mine:/root/file")
        assert person.atoll("cp", "--quiet", "mine:/root/file", "-") == b"from the user"
        person.atoll("exec", "mine", "--", "sync")
        person.atoll("snapshot", "mine", "copied", "--quiet")
        person.atoll("exec", "mine", "--", "sh", "-c", "echo more >> /root/file; sync")
        assert b"  M /root/file  13B -> 18B" in person.atoll("diff", "mine@copied", "mine", "--quiet")
        low = person.run(sys.executable, "-c", ATOLL, "port", "add", "mine", "80:80")
        if low.returncode != 0:
            assert b"ports below 1024 are root's" in low.stderr
        (pid,) = person.run("pgrep", "-u", str(USER), "qemu-system").stdout.decode().split()
        assert owners(pid) == {str(USER)}, "nothing of it is root's"

        assert data.stat().st_uid == USER and data.stat().st_mode & 0o077 == 0, "others are kept out"
        assert (person.home / ".cache/atoll").is_dir()
        (socket,) = data.glob("run/vms/*/control.sock")
        reach = f"import socket; socket.socket(socket.AF_UNIX).connect({str(socket)!r})"
        stranger = Person(STRANGER, person.home)
        assert b"PermissionError" in stranger.run(sys.executable, "-c", reach).stderr

        assert b"mine" in person.atoll("ls", "--quiet")
        of_root = subprocess.run(
            [sys.executable, "-c", ATOLL, "ls", "--quiet"],
            env=os.environ | {"ATOLL_HOME": str(person.home / "of-root")},
            capture_output=True,
            timeout=60,
            check=True,
        )
        assert of_root.stdout == b"", "each user has machines of their own"
        networks_work(person)
        folder = person.home / "shared"
        folder.mkdir()
        os.chown(folder, USER, USER)
        assert b"shared" in person.atoll("share", "add", "mine", "shared:/mnt/here")
        person.atoll("exec", "mine", "--", "sh", "-c", "echo theirs >/mnt/here/file")
        assert (folder / "file").read_text() == "theirs\n" and (folder / "file").stat().st_uid == USER
        person.atoll("stop", "mine")
    finally:
        person.run(sys.executable, "-c", ATOLL, "rm", "--force", "mine", "other")
        person.run(sys.executable, "-c", ATOLL, "net", "rm", "lab")
    assert person.atoll("ls", "--quiet") == b""


@pytest.mark.slow
@pytest.mark.parametrize("uid", [USER, WITH_IDS], ids=["no subordinate ids", "a newuidmap that may not"])
def test_who_can_t_give_vms_users_of_their_own_runs_them_as_himself_and_is_told(uid: int) -> None:
    with somebody(uid) as person:
        subordinate_of(uid)
        why = f"{uid} has no subordinate ids in /etc/subuid and /etc/subgid"
        if uid == WITH_IDS:
            # A copy isn't set-user-ID.
            tools = person.home / "tools"
            tools.mkdir()
            for tool in ("newuidmap", "newgidmap"):
                shutil.copyfile(process.find(tool), tools / tool)
                (tools / tool).chmod(0o755)
            person.environment["PATH"] = f"{tools}:{os.environ['PATH']}"
            why = "newuidmap: write to uid_map failed: Operation not permitted"
        person.atoll("image", "build", "tiny", "--quiet")
        vm = json.loads(person.atoll("run", "tiny", "--name", "v", "--memory", "96MiB", "--quiet", "--format", "json"))
        assert owners(str(vm["vm"]["run"]["pid"])) == {str(uid)}
        assert f"own user: no: {why}" in person.atoll("show", "v").decode()
        assert why in person.run(sys.executable, "-c", ATOLL, "doctor").stdout.decode() or uid == USER
        person.atoll("stop", "--force", "v")
        person.atoll("set", "v", "--isolation", "strict")
        assert f"the isolation 'strict' isn't possible here: own user: {why}" in person.refused("start", "v")
        person.atoll("set", "v", "--isolation", "standard")
        person.atoll("start", "v", "--wait")
        person.atoll("rm", "--force", "v")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_broad_part_of_the_suite_passes_without_root() -> None:
    with somebody(WITH_IDS if subordinate_ids(WITH_IDS) else USER) as person:
        words = ["-m", "pytest", "-q", "-n2", "--dist=loadscope", "-m", "not slow", "-p", "no:cacheprovider"]
        words += [f"tests/{each}" for each in BROAD]
        settings = (f"TMPDIR={person.home}", "PYTHONDONTWRITEBYTECODE=1")
        done = person.run("env", "-C", CHECKOUT, *settings, sys.executable, *words, timeout=2900)
        assert done.returncode == 0, done.stdout.decode()[-20000:] + done.stderr.decode()
        assert not leftovers.processes_of(person.home)
