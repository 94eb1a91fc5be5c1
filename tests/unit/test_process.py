"""Running real programs: what they say, what is told when they fail, and that nothing of them is left."""

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.errors import MissingTool, ProcessFailed
from atoll.host import facts, process
from atoll.host.process import find, run
from atoll.host.watch import wait_for_exit

MIB = 1 << 20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# What comes back


async def test_a_program_gives_its_exit_code_and_both_of_its_outputs() -> None:
    finished = await run(["sh", "-c", r"printf 'out\377'; printf err >&2; exit 3"], check=False)
    assert (finished.exit_code, finished.stdout, finished.stderr) == (3, b"out\xff", b"err")
    assert finished.text == "out\ufffd"


async def test_words_reach_the_program_as_they_are() -> None:
    words = ["a b", "", "$HOME", "'\"", "größe\n", "-x", "*"]
    code = "import sys; sys.stdout.write('\\0'.join(sys.argv[1:]))"
    assert (await run([*python(code), *words])).text.split("\0") == words


async def test_environment_folder_and_descriptors_are_handed_over(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"piped")
    os.close(writing)
    script = f'echo "$EXTRA $HOME"; pwd; cat /dev/fd/{reading}'
    try:
        finished = await run(["sh", "-c", script], env={"EXTRA": "x y"}, cwd=tmp_path, pass_fds=[reading])
    finally:
        os.close(reading)
    assert finished.text.splitlines() == [f"x y {os.environ['HOME']}", str(tmp_path), "piped"]


async def test_big_outputs_on_both_streams_and_a_big_input_pass_at_once() -> None:
    code = (
        "import sys, threading\n"
        "data = sys.stdin.buffer.read()\n"
        "write = threading.Thread(target=sys.stderr.buffer.write, args=(data[::-1],))\n"
        "write.start(); sys.stdout.buffer.write(data); write.join()\n"
    )
    data = os.urandom(MIB) * 16
    finished = await run(python(code), stdin=data)
    assert finished.stdout == data
    assert finished.stderr == data[::-1]


async def test_a_program_that_speaks_before_it_has_read_everything_does_not_hang() -> None:
    data = os.urandom(4 * MIB)
    assert (await run(["cat"], stdin=data)).stdout == data


async def test_without_input_a_program_reads_nothing() -> None:
    assert (await run(["cat"])).stdout == b""
    assert (await run(["cat"], stdin=b"")).stdout == b""


@pytest.mark.parametrize("script", ["exit 0", "exec <&-; sleep 0.2", "head -c 1 >/dev/null"])
async def test_a_program_that_does_not_read_its_input_is_no_failure(script: str) -> None:
    finished = await run(["sh", "-c", script], stdin=bytes(8 * MIB))
    assert finished.exit_code == 0


async def test_lines_and_output_are_told_as_they_come() -> None:
    # The program goes on only when its first line was heard.
    heard, chunks = [], []
    reading, writing = os.pipe()

    def hear(line: str) -> None:
        heard.append(line)
        if line == "first":
            os.write(writing, b"go\n")

    script = f"echo first >&2; read -r word </dev/fd/{reading}; echo second >&2; echo $word; printf last >&2"
    try:
        finished = await run(["sh", "-c", script], on_line=hear, on_output=chunks.append, pass_fds=[reading])
    finally:
        os.close(reading)
        os.close(writing)
    assert heard == ["first", "second", "last"]
    assert b"".join(chunks) == finished.stdout == b"go\n"
    assert finished.stderr == b"first\nsecond\nlast"


async def test_a_line_that_never_ends_neither_hangs_nor_is_lost() -> None:
    heard: list[str] = []
    code = f"import sys; sys.stderr.write('x' * {3 * MIB} + '\\nend'); print('done')"
    finished = await run(python(code), on_line=heard.append)
    assert finished.text == "done\n"
    assert heard[-1] == "end"
    assert "".join(heard) == "x" * (3 * MIB) + "end"


async def test_of_many_lines_the_last_are_kept() -> None:
    heard: list[str] = []
    finished = await run(["sh", "-c", "seq 5000 >&2"], on_line=heard.append)
    assert heard == [str(number) for number in range(1, 5001)]
    assert finished.stderr.split() == [b"%d" % number for number in range(4801, 5001)]


# Failures


async def failed(*argv: str | Path, **options: object) -> ProcessFailed:
    with pytest.raises(ProcessFailed) as failure:
        await run(argv, **options)  # type: ignore[arg-type]
    return failure.value


async def test_a_failure_tells_what_was_said_last_and_a_command_to_paste(tmp_path: Path) -> None:
    marker = tmp_path / "it's here"
    script = 'echo "$WORD" >> "$0"; pwd >> "$0"; seq 9 >&2; exit 7'
    error = await failed("sh", "-c", script, marker, env={"WORD": "two words"}, cwd=tmp_path)
    assert error.what == "sh failed (exit code 7)"
    assert error.why == "6; 7; 8; 9"
    # Pasted into another shell, from another folder, it does the same.
    line = error.next_step.removeprefix("To see it again: ")
    again = subprocess.run(["sh", "-c", line], cwd="/", env={}, capture_output=True, check=False)
    assert (again.returncode, again.stderr.split()[-1]) == (7, b"9")
    assert marker.read_text() == f"two words\n{tmp_path}\n" * 2


async def test_a_program_that_says_nothing_or_speaks_on_its_output_is_told_too() -> None:
    assert (await failed("false")).why == "it said nothing"
    assert (await failed("sh", "-c", "echo sorry; exit 1")).why == "sorry"


async def test_a_program_that_a_signal_ended_is_told() -> None:
    error = await failed("sh", "-c", "kill -SEGV $$")
    assert error.what == f"sh failed (signal {int(signal.SIGSEGV)})"


async def test_a_failure_with_endless_words_is_told_in_short() -> None:
    error = await failed(*python(f"import sys; sys.exit('x' * {MIB})"))
    assert len(error.why) < 600


async def test_a_tool_that_is_missing_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingTool, match="no-such-tool is not installed"):
        await run(["no-such-tool", "--version"])
    monkeypatch.setenv("PATH", "/nonexistent")
    for tool, package in (("qemu-img", "qemu-utils"), ("qemu-system-x86_64", "qemu-system-x86")):
        with pytest.raises(MissingTool) as missing:
            find(tool)
        assert missing.value.next_step == f"Install it: `sudo apt-get install {package}`."


def test_a_tool_by_its_path_is_not_told_to_be_installed(tmp_path: Path) -> None:
    with pytest.raises(MissingTool, match="there is no such program") as missing:
        find(str(tmp_path / "tool"))
    assert "apt-get" not in missing.value.text


def test_system_tools_are_found_though_a_users_path_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert Path(find("mke2fs")).parent in (Path("/usr/sbin"), Path("/sbin"))


async def test_a_program_that_can_not_be_started_is_told(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_bytes(b"\x7fELF, but not really")
    tool.chmod(0o755)
    error = await failed(tool, "--version")
    assert error.what == "tool can't be started"
    assert "Exec format error" in error.why
    assert shlex.join([str(tool), "--version"]) in error.next_step
    error = await failed("true", cwd=tmp_path / "absent")
    assert "absent" in error.why
    error = await failed("true", "x" * 10 * MIB)
    assert "too long" in error.why
    assert len(error.text) < 5000


# Ending


GROUP = """
import os, signal, subprocess, sys, time
if {deaf_child}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
signal.signal(signal.SIGTERM, signal.SIG_IGN if {deaf} else signal.SIG_DFL)
print(os.getpid(), child.pid, file=sys.stderr, flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def none_left(*pids: int) -> Iterator[None]:
    """Ends what should have ended already, after a failure."""
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def started(*, deaf: bool, deaf_child: bool) -> tuple["asyncio.Task[process.Finished]", int, int]:
    """A program that runs with a child; the task that runs it and both pids."""
    pids: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
    code = GROUP.format(deaf=deaf, deaf_child=deaf_child)
    task = asyncio.create_task(
        run(python(code), on_line=lambda line: pids.set_result(tuple(int(word) for word in line.split())))
    )
    program, child = await pids
    return task, program, child


async def gone(pid: int) -> None:
    """Until the process has ended; one that init has still to reap has ended too."""
    await asyncio.wait_for(wait_for_exit(pid), 10)
    assert facts.identity_of(pid) is None


@pytest.mark.parametrize("deaf_child", [False, True])
@pytest.mark.parametrize("deaf", [False, True])
async def test_a_cancel_ends_the_program_and_its_children(
    monkeypatch: pytest.MonkeyPatch, deaf: bool, deaf_child: bool
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.3)
    task, program, child = await started(deaf=deaf, deaf_child=deaf_child)
    with none_left(program, child):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone(program)
        await gone(child)


async def test_a_second_cancel_does_not_wait_for_a_program_that_does_not_listen() -> None:
    task, program, child = await started(deaf=True, deaf_child=True)
    with none_left(program, child):
        task.cancel()
        await asyncio.sleep(0.1)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone(program)
        await gone(child)


async def test_a_timeout_ends_the_program_and_is_told_as_one() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await run(["sleep", "1000"])


async def test_a_listener_that_fails_ends_the_program() -> None:
    pids = []

    def hear(line: str) -> None:
        pids.append(int(line))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run(["sh", "-c", "echo $$ >&2; exec sleep 1000"], on_line=hear)
    with none_left(*pids):
        await gone(pids[0])


async def test_a_program_has_a_session_of_its_own_so_that_ctrl_c_is_ours() -> None:
    finished = await run(python("import os; print(os.getpid(), os.getsid(0))"))
    pid, session = finished.text.split()
    assert pid == session


async def test_a_cancel_at_any_moment_of_the_start_ends_all_of_it_at_once(tmp_path: Path) -> None:
    written = tmp_path / "pids"
    for moment in range(40):
        task = asyncio.create_task(run(["sh", "-c", f"sleep 100 & echo $! >>{written}; wait"]))
        await asyncio.sleep(moment / 4000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 4)
    for line in written.read_text().split():
        await gone(int(line))
