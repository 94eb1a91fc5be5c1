"""Guests of another computer: commands with -H, streams that are cut, and an ordinary user's agent."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
from tests.helpers.agents import remote_agent, trusting
from tests.helpers.command import Ended, atoll
from tests.helpers.images import adopt_cached
from tests.helpers.person import ATOLL, USER, somebody
from tests.helpers.ports import free_port
from tests.helpers.proxy import proxy_to

from atoll.errors import NetworkFailed
from atoll.layout import Layout
from atoll.operations.guest_agent import LINGER
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place
from atoll.store.audit import past
from atoll.store.tokens import Tokens

pytestmark = pytest.mark.vm


async def test_commands_reach_guests_of_a_noted_host(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adopt_cached("tiny", layout)

    async def run(*words: str, stdin: bytes = b"") -> Ended:
        ended = await asyncio.to_thread(atoll, *words, stdin=stdin)
        assert ended.code == 0, ended.err
        return ended

    (tmp_path / "file").write_text("from here")
    async with remote_agent(layout) as url:
        await run("host", "add", "big", url, (await run("token", "join")).out.strip())
        monkeypatch.setenv("ATOLL_HOST", "big")
        await run("run", "tiny", "--name", "web", "--memory", "128MiB")
        assert (await run("exec", "-i", "web", "--", "cat", stdin=b"typed")).out == "typed"
        await run("cp", str(tmp_path / "file"), "web:/root/there")
        assert (await run("exec", "web", "--", "cat", "/root/there")).out == "from here"
        await run("cp", "web:/root/there", str(tmp_path / "back"))
        assert (tmp_path / "back").read_text() == "from here"
        await run("snapshot", "web", "clean")
        assert "clean" in (await run("history", "web")).out
        assert "web" in (await run("logs", "web")).out
        assert "running" in (await run("ls")).out
        await run("rm", "--force", "web")
    asked = past(layout.audit)
    assert {each.via for each in asked} == {"remote"}
    assert {"host.create", "vm.start", "vm.exec.stream", "vm.snapshot", "vm.rm"} <= {each.call for each in asked}


async def test_a_command_doesnt_keep_its_agent_from_the_guest(layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    async with remote_agent(layout) as url:
        invitation = (await asyncio.to_thread(atoll, "token", "join")).out.strip()
        await asyncio.to_thread(atoll, "host", "add", "big", url, invitation)
        await asyncio.to_thread(atoll, "run", "tiny", "--name", "web", "--memory", "128MiB")
        for words in ((), ("-H", "big")):
            # By then the agent has let go of its own connection.
            await asyncio.sleep(LINGER + 0.5)
            ended = await asyncio.to_thread(atoll, *words, "exec", "web", "--", "true")
            assert ended.code == 0, ended.err
        await asyncio.to_thread(atoll, "rm", "--force", "web")


async def test_streams_tell_that_they_were_lost(layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    async with remote_agent(layout) as url, proxy_to(url) as proxy:
        _, secret = Tokens(layout.tokens).create("ci", scope="operate")
        async with RemoteHost(Place(url=proxy.url, token=secret, tls=trusting(layout))) as host:
            vm = await host.run("tiny", name="web", memory="128MiB")
            shell = await vm.shell()
            running = asyncio.create_task(vm.exec(["sleep", "1000"]))
            async with asyncio.timeout(30):
                while (await vm.exec(["pidof", "sleep"])).exit_code != 0:
                    await asyncio.sleep(0.1)
            await proxy.cut()
            for lost in (running, drained(shell)):
                with pytest.raises(NetworkFailed, match="was lost"):
                    await asyncio.wait_for(lost, 20)
            await proxy.mend()
            # What it had begun has ended over there.
            async with asyncio.timeout(30):
                while (await vm.exec(["pidof", "sleep"])).exit_code == 0:
                    await asyncio.sleep(0.1)
            await vm.rm(force=True)


async def drained(shell: object) -> None:
    while await shell.read():  # type: ignore[attr-defined]
        pass


async def test_an_ordinary_users_agent_serves_his_guests(home: Path) -> None:
    with somebody(USER) as person:
        person.environment = {"ATOLL_HOME": str(person.home)}
        person.atoll("image", "build", "tiny", "--quiet")
        port = free_port()
        serving = await asyncio.create_subprocess_exec(
            *person.become, sys.executable, "-c", ATOLL, "serve", "--listen", f"127.0.0.1:{port}",
            env={"HOME": str(person.home), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "ATOLL_HOME": str(person.home)},
            cwd=person.home,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert serving.stderr is not None
        try:
            await asyncio.wait_for(serving.stderr.readuntil(b"agent.sock\n"), 30)
            invitation = person.atoll("token", "join").decode().strip()
            for words in (
                ("host", "add", "his", f"https://127.0.0.1:{port}", invitation),
                ("-H", "his", "run", "tiny", "--name", "web", "--memory", "128MiB"),
            ):
                ended = await asyncio.to_thread(atoll, *words)
                assert ended.code == 0, ended.err
            assert re.search(r"^web +running", person.atoll("ls").decode(), re.MULTILINE)
            assert (await asyncio.to_thread(atoll, "-H", "his", "rm", "--force", "web")).code == 0
        finally:
            serving.terminate()
            await serving.wait()
