"""Commands in a real guest."""

import asyncio
import hashlib
import signal
import sys
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.helpers.machines import Factory, Machine
from tests.vm.guest_of_a_module import guest_of_a_module

from atoll.errors import GuestFailed, TimedOut
from atoll.layout import VmPaths
from atoll.model.state import Phase
from atoll.model.vm import ExecRequest
from atoll.operations import balloon
from atoll.operations.guest_exec import execute
from atoll.operations.observe import phase_of

# One guest serves all tests but the last, which spoils its own.
pytestmark = [pytest.mark.vm, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm() -> AsyncIterator[Machine]:
    async with guest_of_a_module() as machine:
        yield machine


async def processes(vm: Machine, word: str) -> int:
    return int(await vm.sh(f"ps | grep -c '[{word[0]}]{word[1:]}' || true"))


async def test_a_vm_that_is_being_measured_is_still_known_to_run(vm: Machine) -> None:
    """Who measures has the only way to ask QEMU, and whoever looks at the phase, as `exec` does, waits for his turn."""
    for ask in (lambda: balloon.ask_all(vm._services, [vm.record], interval=0), vm.stats):
        measuring = asyncio.ensure_future(ask())
        seen = set()
        while not measuring.done():
            await asyncio.sleep(0)
            seen.add(phase_of(vm._services, vm.record))
        assert measuring.result() is not None
        assert seen == {Phase.RUNNING}


async def test_what_a_command_says_and_how_it_ends_come_back(vm: Machine) -> None:
    result = await vm.exec(["sh", "-c", "echo out; echo err >/dev/stderr; exit 3"])
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert (await vm.exec(["sh", "-c", "kill -TERM $$"])).exit_code == 143
    assert (await vm.exec(["no-such-program"])).exit_code == 127
    assert (await vm.exec(["/etc/passwd"])).exit_code == 126
    words = ["", "a b", "x\ny", "$HOME", "'\"\\", "-n", "é😀"]
    assert (await vm.exec(["printf", "%s|", *words])).stdout.decode() == "".join(f"{word}|" for word in words)
    request = ExecRequest(argv=("sh", "-c", 'pwd; id -un; echo "$A"'), env={"A": " 1\n2 "}, cwd="/tmp", user="root")
    assert (await vm.exec(request)).text == "/tmp\nroot\n 1\n2 "
    assert (await vm.exec(ExecRequest(argv=("true",), cwd="/nowhere"))).exit_code == 126


async def test_standard_input_ends_when_ours_does(vm: Machine) -> None:
    every_byte = bytes(range(256)) * 5000

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(every_byte), 100_000):
            yield every_byte[start : start + 100_000]
            await asyncio.sleep(0)

    assert (await vm.exec(["cat"], stdin=pieces())).stdout == every_byte
    assert (await vm.exec(["cat"], stdin=b"")).stdout == b""
    # Half of a megabyte that nobody reads keeps nobody waiting.
    assert (await asyncio.wait_for(vm.exec(["true"], stdin=every_byte), 10)).exit_code == 0
    for number in range(10):
        assert (await vm.exec(["cat"], stdin=str(number).encode())).stdout == str(number).encode()


async def test_a_hundred_megabytes_each_way_are_not_changed(vm: Machine) -> None:
    content = (await vm.exec(["head", "-c", "1048576", "/dev/urandom"])).stdout * 100
    wanted = hashlib.sha256(content).hexdigest()
    assert (await vm.exec(["sha256sum"], stdin=content)).text.split()[0] == wanted
    await vm.exec(["sh", "-c", "cat >/tmp/1"], stdin=content[: 1 << 20])
    got = hashlib.sha256()
    await vm.exec(["sh", "-c", "i=0; while [ $((i += 1)) -le 100 ]; do cat /tmp/1; done"], on_stdout=got.update)
    assert got.hexdigest() == wanted


async def test_what_is_left_in_the_background_runs_on_and_is_not_heard_again(vm: Machine) -> None:
    begun = time.monotonic()
    script = "(i=0; while [ $((i += 1)) -lt 40 ]; do echo late; sleep 0.1; done; echo end >/tmp/end) & echo now"
    result = await vm.exec(["sh", "-c", script])
    assert result.stdout.startswith(b"now") or b"now\n" in result.stdout
    assert time.monotonic() - begun < 3
    for number in range(10):
        assert (await vm.exec(["echo", str(number)])).text == str(number)
    await vm.sh("while [ ! -e /tmp/end ]; do sleep 0.1; done")


async def test_a_timeout_kills_the_command_and_its_children(vm: Machine) -> None:
    heard = bytearray()
    request = ExecRequest(argv=("sh", "-c", "echo begun; sleep 4711 & sleep 4711; echo no"), timeout=1.5)
    with pytest.raises(TimedOut, match="didn't end"):
        await vm.exec(request, on_stdout=heard.extend)
    assert bytes(heard) == b"begun\n"
    assert await processes(vm, "sleep 4711") == 0


async def test_breaking_off_kills_the_command(vm: Machine) -> None:
    task = asyncio.create_task(vm.exec(["sleep", "4712"]))
    while not await processes(vm, "sleep 4712"):
        await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await processes(vm, "sleep 4712") == 0
    assert (await vm.exec(["echo", "fine"])).text == "fine"


async def test_a_sink_that_fails_kills_the_command(vm: Machine) -> None:
    def full(_: bytes) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await vm.exec(["sh", "-c", "while :; do echo 4713; done"], on_stdout=full)
    assert await processes(vm, "echo 4713") == 0


async def test_twenty_commands_from_five_processes_are_not_mixed(vm: Machine) -> None:
    paths = vm._services.layout.vm(vm.id)
    program = f"""
import asyncio
from pathlib import Path
from atoll.layout import VmPaths
from atoll.model.state import Phase
from atoll.model.vm import ExecRequest
from atoll.operations import balloon
from atoll.operations.guest_exec import execute
from atoll.operations.observe import phase_of

paths = VmPaths(home=Path({str(paths.home)!r}), run=Path({str(paths.run)!r}))

async def one(number):
    script = 'i=0; while [ $((i += 1)) -le 200 ]; do echo "$0"; echo "$0" >&2; done'
    result = await execute(paths, "vm", ExecRequest(argv=("sh", "-c", script, str(number))))
    wanted = f"{{number}}\\n".encode() * 200
    assert (result.exit_code, result.stdout, result.stderr) == (0, wanted, wanted), result

async def main():
    await asyncio.gather(*(one(START * 4 + n) for n in range(4)))

asyncio.run(main())
"""
    tools = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", program.replace("START", str(start)))
        for start in range(5)
    ]
    assert await asyncio.gather(*(tool.wait() for tool in tools)) == [0] * 5


async def test_a_tool_that_is_killed_spoils_nothing_for_the_next(vm: Machine) -> None:
    paths = vm._services.layout.vm(vm.id)
    program = (
        "import asyncio; from pathlib import Path; from atoll.layout import VmPaths;"
        "from atoll.model.vm import ExecRequest; from atoll.operations.guest_exec import execute;"
        f"asyncio.run(execute(VmPaths(home=Path({str(paths.home)!r}), run=Path({str(paths.run)!r})), 'vm',"
        "ExecRequest(argv=('sh', '-c', 'while :; do echo 4714; done')), on_stdout=lambda data: print('x', flush=True)))"
    )
    for _ in range(2):
        tool = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
        assert tool.stdout is not None
        await tool.stdout.readline()
        tool.send_signal(signal.SIGKILL)
        await tool.wait()
        for number in range(5):
            assert (await vm.exec(["echo", str(number)])).text == str(number)


@pytest.mark.slow
async def test_without_ports_the_agent_keeps_the_output(vm: Machine) -> None:
    paths = vm._services.layout.vm(vm.id)
    for number in range(4):
        paths.socket(f"out{number}").rename(paths.socket(f"gone{number}"))
    try:
        await check_captured(paths, vm)
    finally:
        for number in range(4):
            paths.socket(f"gone{number}").rename(paths.socket(f"out{number}"))


async def check_captured(paths: VmPaths, vm: Machine) -> None:
    result = await execute(paths, vm.name, ExecRequest(argv=("sh", "-c", "cat; echo err >&2; exit 4")), stdin=b"in")
    assert (result.exit_code, result.stdout, result.stderr) == (4, b"in", b"err\n")
    with pytest.raises(GuestFailed, match="16 MiB"):
        await execute(paths, vm.name, ExecRequest(argv=("head", "-c", "17825792", "/dev/zero")))
    with pytest.raises(TimedOut):
        await execute(paths, vm.name, ExecRequest(argv=("sleep", "4715"), timeout=0.5))
    assert await processes(vm, "sleep 4715") == 0


@pytest.mark.slow
async def test_a_guest_that_reboots_or_stops_ends_the_command_with_an_error(factory: Factory) -> None:
    vm = await factory.run("tiny")
    task = asyncio.create_task(vm.exec(["sleep", "1000"]))
    while not await processes(vm, "sleep 1000"):
        await asyncio.sleep(0.1)
    await vm.exec(["sh", "-c", "(sleep 0.3; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 &"])
    with pytest.raises(GuestFailed, match="anew"):
        await asyncio.wait_for(task, 60)
    assert (await vm.exec(["echo", "again"])).text == "again"

    task = asyncio.create_task(vm.exec(["sleep", "1000"]))
    while not await processes(vm, "sleep 1000"):
        await asyncio.sleep(0.1)
    begun = time.monotonic()
    await vm.stop(force=True)
    with pytest.raises(GuestFailed, match="QEMU stopped"):
        await task
    assert time.monotonic() - begun < 5
