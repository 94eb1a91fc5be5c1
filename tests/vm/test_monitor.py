"""QMP and the probe against a real QEMU without a machine: what is told when it dies, hangs, or serves someone else."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from atoll.errors import EngineFailed, MissingTool, TimedOut, Unsupported
from atoll.host import facts
from atoll.host.process import find
from atoll.host.sockets import connect, listen
from atoll.host.watch import wait_for_exit
from atoll.layout import Layout
from atoll.model.launch import Capabilities
from atoll.model.spec import Arch
from atoll.model.state import Phase, phase_of_run_state
from atoll.operations.services import Services
from atoll.qemu import probe as probing
from atoll.qemu.monitor import KEPT_EVENTS, Events, Monitor
from atoll.qemu.probe import BINARIES, cached, probe

pytestmark = pytest.mark.vm

QEMU = Path(find("qemu-system-x86_64"))


class Engine:
    """A QEMU without a machine that serves its monitor on a socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        with listen(socket) as server:
            number = server.fileno()
            argv = [QEMU, "-nodefaults", "-no-user-config", "-machine", "none", "-display", "none"]
            argv += ["-chardev", f"socket,id=qmp,fd={number},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
            self.process = subprocess.Popen(argv, pass_fds=[number], stdin=subprocess.DEVNULL)

    def monitor(self, *, timeout: float = 20) -> Monitor:
        return Monitor(connect(self.socket), timeout=timeout)

    def kill(self) -> None:
        self.process.kill()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Meanwhile it hangs: it neither reads nor answers."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def engine(home: Path) -> Iterator[Engine]:
    engine = Engine(home / "qmp.sock")
    try:
        yield engine
    finally:
        engine.kill()
        engine.process.wait()


@pytest.fixture
async def monitor(engine: Engine) -> AsyncIterator[Monitor]:
    async with engine.monitor() as monitor:
        yield monitor


async def until_waiting(*tasks: "asyncio.Task[Any]") -> None:
    """Let the tasks come to where they wait."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


# Commands


async def test_commands_are_answered_and_refused_in_qemus_words(monitor: Monitor) -> None:
    assert (await monitor.execute("query-version"))["qemu"]["major"] >= 8
    with pytest.raises(EngineFailed, match="QEMU refused no-such-command: The command no-such-command has not been"):
        await monitor.execute("no-such-command")
    with pytest.raises(EngineFailed, match="Parameter 'id' is missing"):
        await monitor.execute("object-del")
    assert (await monitor.execute("query-status"))["running"]


async def test_many_commands_at_once_get_their_own_answers(monitor: Monitor) -> None:
    arguments = [{"path": "/machine", "property": name} for name in ("type", "no-such-property")] * 20
    answers = await asyncio.gather(
        *(monitor.execute("qom-get", each) for each in arguments), monitor.execute("query-name"), return_exceptions=True
    )
    assert answers[:-1:2] == ["none-machine"] * 20
    assert all(isinstance(answer, EngineFailed) for answer in answers[1::2])


async def test_a_descriptor_goes_with_its_command(monitor: Monitor) -> None:
    reading, writing = os.pipe()
    try:
        added = await monitor.send_descriptor("add-fd", {"fdset-id": 7, "opaque": "a pipe"}, reading)
    finally:
        os.close(reading)
        os.close(writing)
    (found,) = await monitor.execute("query-fdsets")
    assert found["fdset-id"] == added["fdset-id"] == 7
    assert [each["opaque"] for each in found["fds"]] == ["a pipe"]


async def test_a_qemu_that_hangs_is_told_in_time_and_may_go_on_later(engine: Engine, monitor: Monitor) -> None:
    with engine.stopped(), pytest.raises(TimedOut, match=r"QEMU didn't answer query-name in 0\.1 s"):
        await monitor.execute("query-name", timeout=0.1)
    # The late answer is nobody's.
    assert (await monitor.execute("query-status"))["running"]


async def test_a_command_under_way_fails_when_qemu_is_killed(engine: Engine, monitor: Monitor) -> None:
    with engine.stopped():
        waiting = asyncio.create_task(monitor.execute("query-name"))
        await until_waiting(waiting)
        engine.kill()
    with pytest.raises(EngineFailed, match="QEMU ended during query-name"):
        await asyncio.wait_for(waiting, 10)
    with pytest.raises(EngineFailed, match="QEMU ended during query-status"):
        await asyncio.wait_for(monitor.execute("query-status"), 10)


# Events


async def test_events_are_those_that_were_asked_for_in_their_order(monitor: Monitor) -> None:
    async with monitor.events(["STOP"]) as stops, monitor.events() as everything:
        for _ in range(2):
            await monitor.execute("stop")
            await monitor.execute("cont")
        assert [(await everything.next(timeout=10))["event"] for _ in range(4)] == ["STOP", "RESUME"] * 2
        assert [(await stops.next(timeout=10))["event"] for _ in range(2)] == ["STOP"] * 2
        with pytest.raises(TimedOut, match=r"QEMU didn't report STOP in 0\.05 s"):
            await stops.next(timeout=0.05)
        await monitor.execute("stop")
        assert (await stops.next())["event"] == "STOP"


async def test_everyone_who_waits_is_woken_when_qemu_is_killed(engine: Engine, monitor: Monitor) -> None:
    async with monitor.events(["STOP"]) as stops, monitor.events() as everything:
        waiting = [asyncio.create_task(events.next()) for events in (stops, stops, everything)]
        await until_waiting(*waiting)
        engine.kill()
        for task in waiting:
            with pytest.raises(EngineFailed, match="QEMU ended while an event was awaited") as ended:
                await asyncio.wait_for(task, 10)
            assert "atoll logs" in ended.value.next_step
        with pytest.raises(EngineFailed, match="QEMU ended"):
            await stops.next()
    async with monitor.events() as too_late:
        with pytest.raises(EngineFailed, match="QEMU ended"):
            await asyncio.wait_for(too_late.next(), 10)


async def test_the_last_events_before_the_end_are_not_lost(monitor: Monitor) -> None:
    async with monitor.events() as events:
        await monitor.execute("stop")
        await monitor.execute("quit")
        with pytest.raises(EngineFailed):
            await asyncio.wait_for(asyncio.gather(*(monitor.execute("query-status") for _ in range(2))), 10)
        told = [await events.next(timeout=10) for _ in range(2)]
        assert [event["event"] for event in told] == ["STOP", "SHUTDOWN"]
        assert told[1]["data"]["reason"] == "host-qmp-quit"
        with pytest.raises(EngineFailed, match="QEMU ended"):
            await events.next(timeout=10)


async def test_who_waits_is_woken_when_we_let_go_of_the_monitor(engine: Engine) -> None:
    async def wait(monitor: Monitor) -> None:
        async with monitor.events() as events:
            await events.next()

    async with engine.monitor() as monitor:
        waiting = asyncio.create_task(wait(monitor))
        await until_waiting(waiting)
    with pytest.raises(EngineFailed):
        await asyncio.wait_for(waiting, 10)
    assert engine.process.poll() is None


async def test_a_slow_reader_keeps_the_newest_events_and_knows_how_many_it_lost(monitor: Monitor) -> None:
    pairs, more = KEPT_EVENTS // 2, 3
    async with monitor.events() as slow, monitor.events() as other:
        for _ in range(pairs + more):
            await asyncio.gather(monitor.execute("stop"), monitor.execute("cont"))
        await read_all(other)
        assert slow.dropped == 2 * more
        assert await read_all(slow) == ["STOP", "RESUME"] * pairs
        await monitor.execute("stop")
        assert (await slow.next(timeout=10))["event"] == "STOP"
        assert slow.dropped == 2 * more


async def read_all(events: Events) -> list[str]:
    names = []
    with contextlib.suppress(TimedOut):
        while True:
            names.append((await events.next(timeout=0.3))["event"])
    return names


async def test_a_wait_that_is_cancelled_takes_nothing_away(monitor: Monitor) -> None:
    async with monitor.events(["STOP"]) as events:
        waiting = asyncio.create_task(events.next())
        await until_waiting(waiting)
        waiting.cancel()
        await monitor.execute("stop")
        assert (await events.next(timeout=10))["event"] == "STOP"


# Connecting


async def test_a_monitor_that_another_client_holds_times_out_and_is_free_again_later(engine: Engine) -> None:
    async with engine.monitor() as first:
        with pytest.raises(TimedOut, match=r"QEMU didn't greet in 0\.2 s: it hangs, or another program holds") as busy:
            async with engine.monitor(timeout=0.2):
                raise AssertionError("two have it")
        assert "Try again" in busy.value.next_step
        assert (await first.execute("query-status"))["running"]
        # Who waits in the backlog is served when the first one goes.
        waiting = asyncio.create_task(_status(engine))
        await asyncio.sleep(0.1)
        assert not waiting.done()
    assert await waiting == "running"


async def _status(engine: Engine) -> str:
    async with engine.monitor() as monitor:
        return str((await monitor.execute("query-status"))["status"])


async def test_a_qemu_that_dies_before_it_greets_is_told(engine: Engine) -> None:
    async with engine.monitor():
        with engine.stopped():
            second = asyncio.create_task(_status(engine))
            await asyncio.sleep(0.05)
            engine.kill()
        with pytest.raises(EngineFailed, match="QEMU ended before it answered"):
            await asyncio.wait_for(second, 10)
    engine.process.wait()
    with pytest.raises(ConnectionRefusedError):
        engine.monitor()


async def test_giving_up_while_connecting_leaves_nothing_open(engine: Engine) -> None:
    async with engine.monitor():
        before = descriptors()
        second = asyncio.create_task(_status(engine))
        await asyncio.sleep(0.05)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await asyncio.sleep(0)
        assert descriptors() == before


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_letting_go_leaves_nothing_open(engine: Engine) -> None:
    before = descriptors()
    for _ in range(3):
        assert await _status(engine) == "running"
    assert descriptors() == before


# The state of a guest


async def test_each_run_state_that_this_qemu_knows_has_a_phase(monitor: Monitor) -> None:
    schema = {entry["name"]: entry for entry in await monitor.execute("query-qmp-schema")}
    answer = schema[schema["query-status"]["ret-type"]]
    (kind,) = [member["type"] for member in answer["members"] if member["name"] == "status"]
    states = [member["name"] for member in schema[kind]["members"]]
    assert {"running", "paused", "io-error", "guest-panicked"} <= set(states)
    assert [state for state in states if phase_of_run_state(state) is Phase.UNKNOWN] == []


# The probe


@pytest.mark.parametrize("arch", get_args(Arch))
async def test_each_qemu_tells_what_it_can_do_and_ends(arch: Arch) -> None:
    caps = await probe(Path(find(BINARIES[arch])))
    assert caps.arch == arch
    assert caps.version >= (8, 2, 0)
    assert caps.has(type="virtio-blk-pci", command="blockdev-add", cpu="max", machine="none")
    assert not caps.has(type="no-such-device")
    assert not caps.has(type="virtio-blk-pci", machine="no-such-machine")
    machine = "q35" if arch == "x86_64" else "virt"
    # What is pinned is a versioned type, where there are such types.
    pinned = caps.machines[machine]
    assert caps.machines[pinned] == pinned
    assert arch == "riscv64" or pinned != machine
    assert msgspec.json.decode(msgspec.json.encode(caps), type=Capabilities) == caps


class Wrapper:
    """A script in front of the real QEMU that counts how often it is run."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log = folder / "qemu-system-x86_64", folder / "asked"
        self.write("")

    def write(self, comment: str, *, instead: str = "") -> None:
        run = instead or f'exec {QEMU} "$@"'
        self.path.write_text(f"#!/bin/sh\n# {comment}\necho $$ >> {self.log}\n{run}\n")
        self.path.chmod(0o755)

    def hang(self, said: str = "") -> None:
        """In place of QEMU it waits for a program that it has started."""
        self.write("", instead=f"{said or ':'}\nsleep 1000 &\necho $! >> {self.log}\nwait")

    async def ended(self) -> None:
        """Until it has ended, and what it started."""
        script, program = self.pids
        try:
            for pid in (script, program):
                await asyncio.wait_for(wait_for_exit(pid), 10)
                assert facts.identity_of(pid) is None
        except TimeoutError:
            os.kill(program, signal.SIGKILL)
            raise

    @property
    def pids(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []


@pytest.fixture
def wrapper(home: Path, monkeypatch: pytest.MonkeyPatch) -> Wrapper:
    folder = home / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Wrapper(folder)


async def asked_again(wrapper: Wrapper, layout: Layout) -> bool:
    """Whether a command would ask the binary now."""
    before = len(wrapper.pids)
    caps = await Services(layout).capabilities("x86_64")
    assert caps.binary == str(wrapper.path)
    assert caps.has(machine="q35")
    return len(wrapper.pids) > before


async def test_a_binary_is_asked_once_and_again_when_it_is_another_one(wrapper: Wrapper, layout: Layout) -> None:
    assert await asked_again(wrapper, layout)
    assert not await asked_again(wrapper, layout)
    wrapper.write("an upgrade")
    assert await asked_again(wrapper, layout)
    assert not await asked_again(wrapper, layout)
    # Of the same size, at another time: a build of the same version with other options.
    os.utime(wrapper.path, ns=(1, 1))
    assert await asked_again(wrapper, layout)
    assert not await asked_again(wrapper, layout)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"{}", b'{"binary": "/usr/bin/qemu", "colour": "red"}'])
async def test_what_was_kept_is_asked_again_when_it_can_not_be_read(
    wrapper: Wrapper, layout: Layout, content: bytes
) -> None:
    await asked_again(wrapper, layout)
    (kept,) = layout.capabilities.iterdir()
    kept.write_bytes(content)
    assert cached(wrapper.path, layout.capabilities) is None
    assert await asked_again(wrapper, layout)
    assert not await asked_again(wrapper, layout)


async def test_a_cache_that_can_not_be_written_costs_only_time(wrapper: Wrapper, layout: Layout) -> None:
    layout.cache.write_text("a file where the folder should be")
    assert await asked_again(wrapper, layout)
    assert await asked_again(wrapper, layout)


async def test_a_binary_that_does_not_run_is_told_in_its_own_words(wrapper: Wrapper) -> None:
    wrapper.write("", instead="echo 'error while loading shared libraries: libslirp.so.0' >&2; exit 127")
    with pytest.raises(EngineFailed, match=f"{wrapper.path} can't be asked what it can do: error while loading"):
        await probe(wrapper.path)
    wrapper.write("", instead="exit 0")
    with pytest.raises(EngineFailed, match="can't be asked what it can do: QEMU ended before it answered"):
        await probe(wrapper.path)
    wrapper.path.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(MissingTool, match=r"can't be run: .*Exec format error"):
        await probe(wrapper.path)
    with pytest.raises(MissingTool, match=r"can't be run: .*No such file"):
        await probe(wrapper.path.with_name("absent"))


@pytest.mark.parametrize(("said", "why"), [("", r"QEMU didn't greet in 0\.3 s"), ("echo waiting >&2", "waiting")])
async def test_a_binary_that_hangs_is_ended_and_told(
    wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch, said: str, why: str
) -> None:
    monkeypatch.setattr(probing, "ANSWER_TIME", 0.3)
    wrapper.hang(said)
    with pytest.raises(EngineFailed, match=f"can't be asked what it can do: {why}"):
        await asyncio.wait_for(probe(wrapper.path), 10)
    await wrapper.ended()


async def test_a_probe_that_is_cancelled_ends_its_qemu_at_once(wrapper: Wrapper) -> None:
    wrapper.hang()
    task = asyncio.create_task(probe(wrapper.path))
    while len(wrapper.pids) < 2:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    await wrapper.ended()


async def test_a_qemu_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "OLDEST", (99, 1, 0))
    with pytest.raises(Unsupported, match=r"is version \d+\.\d+\.\d+: Atoll needs 99\.1 or newer\. Install a newer"):
        await probe(QEMU)
