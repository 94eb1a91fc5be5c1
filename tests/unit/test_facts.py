"""Facts read from a real /proc, about real processes."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from atoll.host import facts, kernel
from atoll.model.units import GIB

SLEEP = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits until its standard input is closed, then ends as the test does."""
    process = subprocess.Popen([*SLEEP, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # until then the kernel may not have its argv yet
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_running_process_is_alive_until_it_ends_even_as_a_zombie() -> None:
    with started() as process:
        identity = facts.identity_of(process.pid)
        assert identity is not None
        assert facts.is_alive(identity)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it ended, and isn't reaped: a zombie
        assert not facts.is_alive(identity)
        assert facts.identity_of(process.pid) is None
    assert not facts.is_alive(identity)


def test_the_same_pid_at_another_time_or_in_another_boot_is_another_process() -> None:
    with started() as process:
        identity = facts.identity_of(process.pid)
        assert identity is not None
        assert not facts.is_alive(msgspec.structs.replace(identity, start_time=identity.start_time - 1))
        assert not facts.is_alive(msgspec.structs.replace(identity, boot_id=str(uuid.uuid4())))


def test_start_times_count_from_the_boot() -> None:
    identity = facts.identity_of(os.getpid())
    assert identity is not None
    assert 0 < identity.start_time / os.sysconf("SC_CLK_TCK") <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_scan_finds_whole_words_only() -> None:
    marker = str(uuid.uuid4())
    with started("-uuid", marker) as one, started(f"name={marker}"), started(marker) as two:
        assert facts.scan_for(marker) == sorted([one.pid, two.pid])
        assert facts.scan_for(marker, after="-uuid") == [one.pid]
        assert facts.scan_for(marker[:-1]) == []


def test_a_scan_takes_words_that_are_not_utf_8() -> None:
    marker = os.fsdecode(b"\xff\xfe" + uuid.uuid4().bytes.replace(b"\0", b"1"))
    with started(marker) as process:
        assert facts.scan_for(marker) == [process.pid]


def test_the_free_disk_of_a_folder_that_is_not_there_yet_is_that_of_its_parents(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    assert abs(facts.free_disk(tmp_path / "a/b/c") - stat.f_bavail * stat.f_frsize) < GIB


def test_the_computer_has_processors_and_memory() -> None:
    assert facts.cpu().count == len(os.sched_getaffinity(0))
    assert facts.cpu().model
    memory = facts.memory()
    assert 0 < memory.available <= memory.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_landlock_is_asked_of_the_kernel() -> None:
    # Linux 5.13 brought the first version; the kernel's list of security modules says whether it is on.
    assert (kernel.landlock_version() > 0) == ("landlock_create_ruleset" in Path("/proc/kallsyms").read_text())


def test_namespaces_are_usable_exactly_where_one_can_be_made() -> None:
    made = subprocess.run(["unshare", "--user", "true"], check=False, capture_output=True).returncode == 0
    assert kernel.user_namespaces().usable == made


def test_control_groups_that_are_writable_can_be_divided() -> None:
    groups = kernel.cgroups()
    assert groups.writable <= groups.controllers
    assert (groups.version == 0) == (not groups.controllers)


def test_threads_are_found_by_their_own_numbers() -> None:
    threads = facts.threads_by_own_number(os.getpid())
    assert threads[os.getpid()] == os.getpid()
    assert facts.threads_by_own_number(2**22 + 1) == {}
    confined = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", "sleep", "60"] if os.geteuid() == 0 else ["sleep", "60"]
    )
    try:
        children = Path(f"/proc/{confined.pid}/task/{confined.pid}/children")
        while os.geteuid() == 0 and not (found := children.read_text().split()):
            time.sleep(0.01)
        inner = int(found[0]) if os.geteuid() == 0 else confined.pid
        assert set(facts.threads_by_own_number(inner).values()) == {inner}
        assert os.geteuid() != 0 or set(facts.threads_by_own_number(inner)) == {1}
    finally:
        confined.kill()
        confined.wait()
