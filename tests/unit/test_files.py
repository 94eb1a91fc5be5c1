"""Files that are whole or as they were, and locks that go with their process, tried with processes that are killed."""

import asyncio
import contextlib
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.helpers.tool import ROOT

from atoll.errors import Busy, StorageFailed
from atoll.host.files import freeze, locked, make_folder, sha256_of, write_atomically
from atoll.host.lease import lease

MIB = 1 << 20


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def python(code: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code`, which says something when it has begun; it is killed at the end."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def the_rest_of(process: subprocess.Popen[str]) -> str:
    """What it says to its end. (`communicate` would miss what came together with the first line.)"""
    assert process.stdout is not None
    return process.stdout.read()


# Writing


def test_content_and_mode_are_as_wanted_and_nothing_else_is_there(tmp_path: Path) -> None:
    path = tmp_path / "größe 🐧.json"
    write_atomically(path, b"old")
    assert (path.read_bytes(), mode_of(path)) == (b"old", 0o600)
    write_atomically(path, b"", mode=0o644)
    assert (path.read_bytes(), mode_of(path)) == (b"", 0o644)
    assert names_in(tmp_path) == [path.name]


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old" * MIB)
    with path.open("rb") as file:
        write_atomically(path, b"new")
        assert file.read() == b"old" * MIB
    assert path.read_bytes() == b"new"


WRITER = """
from atoll.host.files import write_atomically
path, number = Path(sys.argv[1]), 0
write_atomically(path, b"a" * (1 << 20))
print("begun", flush=True)
while True:
    number += 1
    write_atomically(path, b"ab"[number % 2 : number % 2 + 1] * (1 << 20))
"""


def test_a_file_is_whole_at_every_moment_also_when_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = set()
    for _ in range(3):
        with python(WRITER, path) as writer:
            for _ in range(30):
                seen.add(path.read_bytes())
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        seen.add(path.read_bytes())
    assert seen <= {b"a" * MIB, b"b" * MIB}
    write_atomically(path, b"after")
    assert path.read_bytes() == b"after"


FULL = """
import resource, signal
from atoll.errors import StorageFailed
from atoll.host.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
print("begun", flush=True)
try:
    write_atomically(Path(sys.argv[1]), bytes(1 << 20))
except StorageFailed as error:
    print(error.text)
"""


def test_a_write_that_fails_half_way_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with python(FULL, path) as writer:
        told = the_rest_of(writer)
    assert told.startswith(f"can't write {path}: File too large")
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


FORBIDDEN = """
import os
from atoll.errors import StorageFailed
from atoll.host import files
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
print("begun", flush=True)
home = Path(sys.argv[1])
for attempt in (
    lambda: files.write_atomically(home / "file", b"new"),
    lambda: files.freeze(home / "file", home / "frozen"),
    lambda: files.make_folder(home / "folder"),
    lambda: files.sha256_of(home / "secret"),
    lambda: files.locked(home / "lock").__enter__(),
):
    try:
        attempt()
    except StorageFailed as error:
        print(error.text)
"""


def test_what_the_user_may_not_do_is_told_with_the_path_and_changes_nothing(home: Path) -> None:
    (home / "file").write_bytes(b"old")
    (home / "secret").write_bytes(b"")
    (home / "secret").chmod(0)
    home.chmod(0o555)
    with python(FORBIDDEN, home) as other:
        told = the_rest_of(other).splitlines()
    home.chmod(0o755)
    doing = ["write", "store", "make the folder", "read", "open"]
    paths = ["file", "frozen", "folder", "secret", "lock"]
    for line, verb, name in zip(told, doing, paths, strict=True):
        assert re.match(f"can't {verb} {home / name}: (Permission denied|Operation not permitted)", line)
        assert "set ATOLL_HOME" in line
    assert (home / "file").read_bytes() == b"old"
    assert names_in(home) == ["file", "secret"]


@pytest.mark.parametrize(
    ("attempt", "why"),
    [
        (lambda path: write_atomically(path / "folder", b"x"), "Is a directory"),
        (lambda path: write_atomically(path / "absent/file", b"x"), "No such file"),
        (lambda path: freeze(path / "absent", path / "frozen"), "No such file"),
        (lambda path: make_folder(path / "file"), "File exists"),
        (lambda path: make_folder(path / "file/below"), "Not a directory"),
        (lambda path: sha256_of(path / "absent"), "No such file"),
        (lambda path: sha256_of(path / "folder"), "Is a directory"),
        (lambda path: locked(path / "folder").__enter__(), "Is a directory"),
        (lambda path: locked(path / "file/lock").__enter__(), "Not a directory|File exists"),
    ],
)
def test_what_can_not_be_is_told_and_changes_nothing(
    tmp_path: Path, attempt: Callable[[Path], object], why: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(StorageFailed, match=why):
        attempt(tmp_path)
    assert names_in(tmp_path) == ["file", "folder"]
    assert names_in(tmp_path / "folder") == []
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_frozen_file_has_its_last_name_and_can_only_be_read(tmp_path: Path) -> None:
    temporary, final = tmp_path / "temporary", tmp_path / "layer"
    temporary.write_bytes(b"content")
    freeze(temporary, final)
    assert (final.read_bytes(), mode_of(final)) == (b"content", 0o444)
    assert names_in(tmp_path) == ["layer"]


def test_folders_are_made_for_this_user_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_folder(tmp_path / "a/b/c")
    finally:
        os.umask(before)
    assert [mode_of(folder) for folder in (made, made.parent, made.parent.parent)] == [0o700] * 3
    made.chmod(0o755)
    make_folder(made)
    assert mode_of(made) == 0o755  # one that was there stays as it was


def test_a_digest_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = os.urandom(3 * MIB + 1)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# Locks

HOLDER = """
import subprocess
from atoll.host.files import locked
with locked(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "1000"]) if "child" in sys.argv else None
    print("begun", flush=True)
    if child:
        print(child.pid, flush=True)
    sys.stdin.readline()
print("let go", flush=True)
sys.stdin.readline()
"""


def test_a_lock_has_one_holder_among_processes_until_it_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "run/locks/a.lock"
    with python(HOLDER, path) as holder:
        with locked(path, wait=False) as got:
            assert not got
        with locked(path.with_name("other.lock"), wait=False) as got:
            assert got
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "let go\n"
        with locked(path, wait=False) as got:
            assert got
    assert path.exists()


def test_a_lock_goes_with_its_process_though_what_that_started_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with python(HOLDER, path, "child") as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            holder.send_signal(signal.SIGKILL)
            with locked(path) as got:
                assert got
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_two_holders_in_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with locked(path), locked(path, wait=False) as got:
        assert not got
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    with locked(path, wait=False) as got:
        assert got


async def test_a_lease_that_another_process_keeps_is_busy_and_tells_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "run/a.lock"
    with python(HOLDER, path) as holder:
        for timeout in (0.0, 0.05):
            with pytest.raises(Busy, match=f"web is busy: another operation has worked on it for over {timeout:g} s"):
                async with lease(path, what="web", timeout=timeout):
                    raise AssertionError("two have it")
        waiting = asyncio.create_task(_hold(path))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        holder.send_signal(signal.SIGKILL)
        assert await waiting == "held"


async def _hold(path: Path) -> str:
    async with lease(path, what="web", timeout=30):
        return "held"


async def test_tasks_take_turns_and_one_that_is_cancelled_gives_its_place_up(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    inside = 0

    async def work(number: int) -> int:
        nonlocal inside
        async with lease(path, what="web", timeout=30):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0.002)
            inside -= 1
        return number

    async with lease(path, what="web", timeout=1):
        tasks = [asyncio.create_task(work(number)) for number in range(8)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == list(range(1, 8))
    assert await _hold(path) == "held"


async def test_a_lease_is_let_go_when_its_work_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    before = len(names_in(Path("/proc/self/fd")))
    with pytest.raises(ZeroDivisionError):
        async with lease(path, what="web", timeout=1):
            raise ZeroDivisionError
    async with lease(path, what="web", timeout=0):
        pass
    assert len(names_in(Path("/proc/self/fd"))) == before
