"""The same calls do the same in this process and through an agent: results, errors, progress, cancelling."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers import image_files
from tests.helpers.agents import agent, remote_agent, trusting
from tests.helpers.images import adopt_cached
from tests.helpers.ports import free_port

from atoll.errors import AlreadyExists, ImageRefused, InvalidInput, NotFound, TimedOut, WrongState
from atoll.layout import Layout
from atoll.model.names import new_id
from atoll.model.requests import DiskRequest, ImportRequest, SetRequest
from atoll.model.spec import PortSpec
from atoll.model.state import Phase
from atoll.platform.api import AsyncHost, AsyncVm
from atoll.platform.local import LocalHost
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place
from atoll.store.sqlite import SqliteRecords
from atoll.store.tokens import Tokens

pytestmark = pytest.mark.vm


@pytest.fixture(params=["process", "socket", "https"])
async def host(request: pytest.FixtureRequest, layout: Layout) -> AsyncIterator[AsyncHost]:
    """This computer, reached in each of the ways, with the image `tiny`."""
    await adopt_cached("tiny", layout)
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "process":
            reached: AsyncHost = LocalHost(layout)
        elif request.param == "https":
            url = await stack.enter_async_context(remote_agent(layout))
            _, secret = Tokens(layout.tokens).create("tests", scope="operate")
            reached = RemoteHost(Place(url=url, token=secret, tls=trusting(layout)))
        else:
            await stack.enter_async_context(agent(layout))
            reached = RemoteHost(Place(url="http://atoll", socket=str(layout.agent_socket)))
        async with reached:
            try:
                yield reached
            finally:
                for each in await reached.ls():
                    await (await reached.get(each.vm.id)).rm(force=True)


async def phase(vm: AsyncVm) -> Phase:
    return (await vm.info()).phase


async def test_a_vm_lives_its_life(host: AsyncHost, tmp_path: Path) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB")
    assert [(each.vm.name, each.phase) for each in await host.ls()] == [("web", Phase.RUNNING)]

    told: list[bytes] = []

    async def typed() -> AsyncIterator[bytes]:
        for word in (b"one ", b"two"):
            yield word

    result = await vm.exec(["sh", "-c", "cat; echo no >&2; exit 3"], stdin=typed(), on_stdout=told.append)
    assert (result.exit_code, b"".join(told), result.stdout, result.stderr) == (3, b"one two", b"", b"no\n")

    long = await vm.exec(["wc", "-c"], stdin=bytes(17 << 20))
    assert int(long.text) == 17 << 20

    (tmp_path / "file").write_bytes(b"x" * 300_000)
    await vm.copy_to(tmp_path / "file", "/root/copy")
    await vm.copy_from("/root/copy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"x" * 300_000

    await vm.pause()
    assert await phase(vm) is Phase.PAUSED
    await vm.resume()
    await vm.rename("www")
    assert vm.name == "www"
    assert (await host.get("www")).id == vm.id
    changes = await vm.set(SetRequest(labels={"tier": "test"}))
    assert [(each.name, each.when) for each in changes] == [("label tier", "now")]

    await vm.stop()
    assert await vm.rm() == 0
    assert await host.ls() == []


async def test_history_is_written_and_read(host: AsyncHost, tmp_path: Path) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB")
    steps: list[str] = []
    snapshot = await vm.snapshot("clean", message="at first", report=lambda progress: steps.append(progress.step))
    assert (snapshot.name, snapshot.message) == ("clean", "at first")
    assert "save the memory" in steps

    await vm.exec(["sh", "-c", "echo later > /root/file"])
    await vm.restore("clean")
    assert (await vm.exec(["ls", "/root"])).text == ""

    forks = await vm.fork(2, name="web-{n}")
    assert [each.name for each in forks] == ["web-1", "web-2"]
    async with forks:
        assert [await phase(each) for each in forks] == [Phase.RUNNING] * 2
    clone = await host.clone("web@clean", "copy")
    await clone.export(tmp_path / "bundle")
    imported = await host.import_bundle(tmp_path / "bundle", "again")
    assert {each.vm.name for each in await host.ls()} == {"web", "copy", "again"}
    assert await phase(imported) is Phase.STOPPED
    assert [each.snapshot.name for each in await vm.history()] == ["clean"]


async def test_long_lists_are_those_of_now(host: AsyncHost, layout: Layout) -> None:
    model = (await (await host.create("tiny", name="web")).info()).vm
    records = SqliteRecords(layout.database)
    for number in range(100):
        records.add_vm(replace(model, id=new_id(), name=f"web-{number}"))
    before = await host.ls()
    assert (len(before), await host.ls()) == (101, before)
    records.remove_vm(before[-1].vm.id)
    assert await host.ls() == before[:-1]
    for each in before[1:-1]:
        records.remove_vm(each.vm.id)
    records.close()


async def test_images_are_made_of_files(host: AsyncHost, tmp_path: Path) -> None:
    (tmp_path / "My CD.iso").write_bytes(image_files.iso())
    image = await host.images.import_file(ImportRequest(path=str(tmp_path / "My CD.iso"), description="mine"))
    assert (image.name, image.disks[0].media, image.description) == ("my-cd:latest", "cdrom", "mine")
    assert image in await host.images.ls()
    (tmp_path / "empty").touch()
    with pytest.raises(ImageRefused, match="it is empty"):
        await host.images.import_file(ImportRequest(path=str(tmp_path / "empty")))
    (tmp_path / "damaged").write_bytes(b"QFI\xfb" + bytes(600))
    with pytest.raises(ImageRefused, match="damaged can't be used as an image"):
        await host.images.import_file(ImportRequest(path=str(tmp_path / "damaged")))


async def test_terminals_are_joined(host: AsyncHost) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB")
    shell = await vm.shell()
    await shell.resize(rows=40, columns=100)
    await shell.write(b"stty size; exit 7\n")
    said = b""
    while data := await shell.read():
        said += data
    await shell.close()
    assert b"40 100" in said
    assert getattr(shell, "exit_code", None) == 7

    console = await vm.console()
    await console.write(b"\n")
    assert await asyncio.wait_for(console.read(), 30)
    await console.close()
    assert b"root@web" in b"".join([piece async for piece in vm.logs(tail=2)])


async def test_errors_are_the_same(host: AsyncHost) -> None:
    with pytest.raises(NotFound, match="there is no VM 'nix'"):
        await host.get("nix")
    vm = await host.create("tiny", name="web", memory="128MiB")
    with pytest.raises(AlreadyExists, match="'web'"):
        await host.create("tiny", name="web")
    with pytest.raises(InvalidInput, match="not a name"):
        await host.create("tiny", name="not a name")
    with pytest.raises(WrongState) as refused:
        await vm.pause()
    assert "start" in refused.value.next_step
    with pytest.raises(WrongState):
        await vm.shell()
    await vm.start()
    with pytest.raises(TimedOut):
        await vm.wait(text="never", timeout=0.1)


async def test_cancelling_undoes_it(host: AsyncHost) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB")
    running = asyncio.create_task(vm.exec(["sleep", "1000"]))
    await asyncio.sleep(1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(20):
        while (await vm.exec(["pidof", "sleep"])).exit_code == 0:
            await asyncio.sleep(0.1)

    cloning = asyncio.create_task(host.clone("web", "copy", full=True))
    await asyncio.sleep(0.01)
    cloning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cloning
    assert [each.vm.name for each in await host.ls()] == ["web"]
    assert all(each.state in ("done", "undone") for each in await host.operations.ls())


async def test_devices_come_and_go(host: AsyncHost) -> None:
    vm = await host.run("tiny", name="web", memory="128MiB")
    port = free_port()
    assert await vm.publish(PortSpec(host_port=port, guest_port=80)) in await vm.ports()
    await vm.unpublish(port)
    assert await vm.ports() == []
    disk, change = await vm.disk_add(DiskRequest(size="1GiB"))
    assert (disk.name, change.when) == ("data1", "now")
    await vm.disk_resize("data1", "2GiB")
    await vm.disk_rm("data1")
    assert [each.name for each in await vm.disks()] == ["root"]
    assert (await vm.stats()).memory_given == 128 << 20


async def test_networks_and_groups(host: AsyncHost) -> None:
    group = await host.networks.groups.create("web", ["allow in tcp 80 from any"])
    assert group == await host.networks.groups.show("web")
    network = await host.networks.create("lab")
    vm = await host.create("tiny", name="web", memory="128MiB")
    nic, _ = await vm.net_attach("lab")
    assert nic.network == network.id
    await vm.net_detach("lab")
    await host.networks.rm("lab")
    await host.networks.groups.rm("web")
    assert await host.networks.ls() == []


async def test_events_are_followed(host: AsyncHost) -> None:
    events = host.events(follow=True, after=0)
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        await host.create("tiny", name="web", memory="128MiB")
        async with asyncio.timeout(10):
            async for event in events:
                if event.kind == "vm.created":
                    break
    assert event.name == "web"
    past = [each async for each in host.events(follow=False, after=event.id - 1)]
    assert past[0] == event


async def test_all_are_stopped(host: AsyncHost) -> None:
    await host.run("tiny", name="db", memory="96MiB", boot_order=1)
    await host.run("tiny", name="web", memory="96MiB", boot_order=2, restart="always")
    done = await host.stop_all(timeout=60)
    assert [(each.name, each.outcome) for each in done] == [("web", "stopped"), ("db", "stopped")]
    assert {each.phase for each in await host.ls()} == {Phase.STOPPED}
    changes = await (await host.get("web")).set(SetRequest(restart="never", autostart=True))
    assert [(each.name, each.value) for each in changes] == [("restart", "never"), ("autostart", "true")]
