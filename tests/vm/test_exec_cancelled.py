"""Commands that are broken off at any moment, by any clients: they end in the guest, and the next ones run."""

import asyncio
import contextlib
import os
import random
import re
import signal
from collections.abc import AsyncIterator

import pytest
from tests.helpers.agents import agent, remote_agent, trusting
from tests.helpers.command import ATOLL
from tests.helpers.images import adopt_cached
from tests.helpers.machines import Factory

from atoll.layout import Layout
from atoll.operations.guest_running import Running
from atoll.platform.api import AsyncVm
from atoll.platform.remote import RemoteHost
from atoll.platform.remote_streams import open_socket
from atoll.platform.wire import Place
from atoll.store.tokens import Tokens

pytestmark = pytest.mark.vm
ROUNDS = 50
BUSY = "while :; do :; done"


async def answers(vm: AsyncVm, text: str) -> None:
    """A plain command says what it is told to, and nothing of another one's."""
    async with asyncio.timeout(60):
        result = await vm.exec(["echo", text])
    assert (result.exit_code, result.text, result.stderr) == (0, text, b"")


async def processes(vm: AsyncVm, words: str, *, run: bool) -> None:
    """Until one with these words runs in the guest, or none does any more."""
    async with asyncio.timeout(60):
        while (words in (await vm.exec(["ps"])).text) is not run:
            await asyncio.sleep(0.1)


async def test_who_is_cancelled_as_its_streams_are_ready_disturbs_nobody(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await factory.run("tiny", memory="128MiB")
    greeted = Running._greeted

    async def cancelled(self: Running, *given: object) -> bool:
        await greeted(self, *given)  # type: ignore[arg-type]
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(Running, "_greeted", cancelled)
        with pytest.raises(asyncio.CancelledError):
            await vm.exec(["true"])
    await answers(vm, "after the greeting")
    for _ in range(3):
        # Its slot's streams are made anew, while those of before are connected.
        assert (await vm.exec(["sh", "-c", "sleep 100 & echo x"])).text == "x"
        await answers(vm, "after something was left")

    # One who is cancelled again, while the command is being killed.
    running = asyncio.create_task(vm.exec(["sleep", "4321"]))
    await processes(vm, "sleep 4321", run=True)
    for _ in range(5):
        running.cancel()
        await asyncio.wait([running], timeout=0.01)
    await asyncio.gather(running, return_exceptions=True)
    await processes(vm, "sleep 4321", run=False)


@pytest.mark.slow
async def test_a_client_is_missed_though_its_guest_takes_nothing(factory: Factory) -> None:
    vm = await factory.run("tiny", memory="128MiB")
    reading, writing = os.pipe()
    loop = asyncio.get_running_loop()
    async with agent(factory.layout):
        command = await asyncio.create_subprocess_exec(
            *ATOLL, "exec", "-i", vm.name, "--", "sleep", "1234", stdin=reading
        )
        os.close(reading)

        async def feed() -> None:
            with contextlib.suppress(OSError):
                while True:
                    await loop.run_in_executor(None, os.write, writing, bytes(1 << 20))

        feeding = asyncio.create_task(feed())
        async with RemoteHost(Place(url="http://atoll", socket=str(factory.layout.agent_socket))) as host:
            reached = await host.get(vm.id)
            await processes(reached, "sleep 1234", run=True)
            await asyncio.wait([feeding], timeout=2)
            command.kill()
            await command.wait()
            await feeding
            os.close(writing)
            await processes(reached, "sleep 1234", run=False)


@pytest.fixture(params=["socket", "https"])
async def host(request: pytest.FixtureRequest, layout: Layout) -> AsyncIterator[RemoteHost]:
    await adopt_cached("tiny", layout)
    async with contextlib.AsyncExitStack() as stack:
        place = Place(url="http://atoll", socket=str(layout.agent_socket))
        if request.param == "https":
            url = await stack.enter_async_context(remote_agent(layout))
            place = Place(url=url, token=Tokens(layout.tokens).create("ci", scope="operate")[1], tls=trusting(layout))
        else:
            await stack.enter_async_context(agent(layout))
        reached = await stack.enter_async_context(RemoteHost(place))
        try:
            yield reached
        finally:
            for each in await reached.ls():
                await (await reached.get(each.vm.id)).rm(force=True)


@contextlib.asynccontextmanager
async def load() -> AsyncIterator[None]:
    """Two programs that take all the processor that they get."""
    busy = [await asyncio.create_subprocess_exec("sh", "-c", BUSY) for _ in range(2)]
    try:
        yield
    finally:
        for each in busy:
            each.kill()
            await each.wait()


@pytest.mark.slow
@pytest.mark.timeout(1500)
async def test_commands_that_are_cancelled_at_any_moment_leave_the_next_ones_alone(host: RemoteHost) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB")
    dice = random.Random(5)
    kinds = (
        (["sleep", "1234"], None),
        (["true"], None),
        (["sh", "-c", "yes | head -c 3000000"], None),
        (["cat"], b"x" * 300_000),
        (["sh", "-c", "sleep 100 & echo x"], None),
    )
    async with load():
        for count in range(ROUNDS):
            words, stdin = dice.choice(kinds)
            running = [asyncio.create_task(vm.exec(words, stdin=stdin)) for _ in range(dice.choice((1, 1, 3, 6)))]
            await asyncio.wait(running, timeout=dice.choice((1.5, 0.2)) * dice.random())
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.gather(*(answers(vm, f"{count}-{each}") for each in range(dice.choice((1, 1, 4)))))
    await processes(vm, "sleep 1234", run=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
async def test_command_lines_that_are_killed_leave_the_next_ones_alone(host: RemoteHost, layout: Layout) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB")
    dice = random.Random(6)
    environment = os.environ | {"ATOLL_HOME": str(layout.data.parent)}
    for count in range(30):
        command = await asyncio.create_subprocess_exec(
            *ATOLL, "exec", "web", "--", "sleep", "1234", env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        await asyncio.wait([asyncio.ensure_future(command.wait())], timeout=2.0 * dice.random())
        command.send_signal(dice.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)))
        await command.wait()
        await answers(vm, str(count))
    await processes(vm, "sleep 1234", run=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_guest_may_take_its_time_with_what_it_is_sent(host: RemoteHost) -> None:
    """Longer than pings would wait; and in one piece it is longer than a message may be."""
    vm = await host.run("tiny", name="web", memory="128MiB")
    sent = bytes(20 << 20)
    result = await vm.exec(["sh", "-c", "sleep 50; wc -c"], stdin=sent)
    assert result.text.strip() == str(len(sent))


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_who_reads_nothing_and_vanishes_leaves_nothing_behind(host: RemoteHost) -> None:
    """Also while the agent is opening what was asked for; and what is killed then isn't what comes after it."""
    vm = await host.run("tiny", name="web", memory="128MiB")
    openings = (
        ("exec", '{"command": {"argv": ["yes"]}}'),
        ("exec", '{"command": {"argv": ["cat", "/dev/zero"]}}'),
        ("exec", '{"command": {"argv": ["yes"]}, "stdin": true}'),
        ("shell", '{"command": ["yes"]}'),
    )
    for pause in (0.0, 0.1, 0.5, 2.0, 5.0):
        opened = [(await open_socket(host._wire, f"/vms/web/{way}"), said) for way, said in openings]
        for socket, said in opened:
            await socket.send(said)
            socket.transport.pause_reading()
        await asyncio.sleep(pause)
        for socket, _ in opened:
            socket.transport.abort()
        await asyncio.gather(*(answers(vm, f"{pause}-{each}") for each in range(3)))
        async with asyncio.timeout(60):
            while re.search(r"\b(yes|zero)\b", (await vm.exec(["ps"])).text):
                await asyncio.sleep(0.2)
