"""The tool is killed at everything that it does to the world where no journal is: networks that come up, cables with
a relay, captures, folders that are mounted. The next command does it as ever, and nothing is left behind.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.helpers import leftovers, tool
from tests.helpers.machines import Factory, Machine
from tests.helpers.tool import Act
from tests.helpers.world import disagreements

from atoll.host import cables, link_text, namespace, slirp
from atoll.host.network import look
from atoll.layout import NetworkPaths
from atoll.model.requests import CaptureRequest, ImpairRequest, NetworkRequest, NicRequest, ShareRequest
from atoll.operations.guest_agent import let_go
from atoll.operations.look import observing
from atoll.platform.local import LocalHost
from atoll.qemu.monitor import Monitor

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

WORKING = 0.004
"""Seconds in which what was begun is at its work: a program starts, a word is on its way."""
SOON = 0.2


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def killed_at_each(
    factory: Factory, action: str, *, before: Callable[[], Awaitable[object]], after: Callable[[str], Awaitable[object]]
) -> None:
    """Kill the action at its first act, at its second …, until it comes to its end."""
    for later in (0.0, WORKING):
        number, code = 0, -9
        while code < 0:
            number += 1
            await before()
            code, said = await asyncio.to_thread(tool.run, factory.layout, action, kill_at_act=Act(number, later))
            assert code <= 0, said
            # What it had forked is a program by then. No command that is typed comes sooner.
            await asyncio.sleep(SOON)
            async with LocalHost(factory.layout):
                pass
            await after(f"killed at {number}, {later} s later")
            assert number < 200
        assert number > 5, "it did nothing that could be seen"


def programs_of(paths: NetworkPaths) -> list[str]:
    """What runs for a network, by its program's name."""
    return sorted(Path(argv.split()[0]).name for argv in leftovers.processes_of(paths.run).values())


async def is_whole(paths: NetworkPaths) -> None:
    """It is up with all that belongs to it, once."""
    holder = namespace.holder_of(paths)
    assert holder is not None
    assert programs_of(paths).count("slirp4netns") == 1
    assert programs_of(paths).count("dnsmasq") == 2
    assert slirp.listener(paths.uplink) is not None
    answers = await namespace.run(holder.pid, "cat", f"/proc/sys/net/ipv4/conf/{link_text.UPLINK}/proxy_arp")
    assert answers.text.strip() == "1", "published ports find their VMs"


async def test_a_network_that_comes_up(factory: Factory) -> None:
    networks = factory.host.networks

    async def before() -> None:
        await networks.create(NetworkRequest(name="wan", mode="nat"))

    async def after(where: str) -> None:
        paths = factory.layout.network((await networks.show("wan")).network.id)
        assert (await networks.exec("wan", ["true"])).exit_code == 0, where
        await until(lambda: programs_of(paths).count("dnsmasq") == 2)
        await is_whole(paths)
        await networks.rm("wan")
        await until(lambda: programs_of(paths) == [])
        assert not paths.run.exists(), where

    await killed_at_each(factory, "await host.networks.exec('wan', ['true'])", before=before, after=after)


async def on_lab(factory: Factory) -> tuple[Machine, NetworkPaths]:
    lab = await factory.host.networks.create("lab")
    vm = await factory.run("tiny", name="v", memory="96MiB", nics=(NicRequest(network="lab"),))
    return vm, factory.layout.network(lab.id)


async def test_a_cable_that_gets_a_relay_and_loses_it(factory: Factory) -> None:
    vm, paths = await on_lab(factory)
    late = ImpairRequest(delay=0.01)

    async def cable() -> tuple[list[str], int]:
        holder = namespace.holder_of(paths)
        assert holder is not None
        links, _ = await look(holder.pid)
        return sorted(link.name[0] for link in links if link.name not in ("lo", "br0")), len(cables.relays_of(paths))

    async def as_ever(where: str) -> None:
        await vm.net_impair(late)
        assert await cable() == (["i", "q", "r", "t"], 1), where
        await vm.net_impair(ImpairRequest())
        assert await cable() == (["t"], 0), where

    async def impaired() -> None:
        await vm.net_impair(late)

    async def nothing() -> None:
        return

    action = "await (await host.get('v')).net_impair(ImpairRequest(%s))"
    await killed_at_each(factory, action % "delay=0.01", before=nothing, after=as_ever)
    await killed_at_each(factory, action % "", before=impaired, after=as_ever)


async def test_a_card_that_comes(factory: Factory) -> None:
    await factory.host.networks.create("lab")
    vm = await factory.run("tiny", name="v", memory="96MiB")

    async def without() -> None:
        if len(vm.record.spec.nics) > 1:
            await vm.net_detach("lab")

    async def agreed(where: str) -> None:
        assert await disagreements(factory.layout) == [], where

    await killed_at_each(factory, "await (await host.get('v')).net_attach('lab')", before=without, after=agreed)


async def test_a_capture(factory: Factory) -> None:
    vm, _ = await on_lab(factory)

    async def nothing() -> None:
        return

    async def parts(monitor: Monitor) -> str:
        return str(await monitor.execute("query-chardev") + await monitor.execute("qom-list", {"path": "/objects"}))

    async def taken_away(where: str) -> None:
        async for _ in vm.net_capture(CaptureRequest(seconds=0.01)):
            pass
        told = await observing(factory.host._services, vm.record, parts)
        assert "capture-" not in told, where

    action = """
async for _ in (await host.get('v')).net_capture(CaptureRequest(seconds=0.01)):
    pass
"""
    await killed_at_each(factory, action, before=nothing, after=taken_away)


async def test_a_folder_that_is_mounted(factory: Factory, home: Path) -> None:
    folder = home / "shared"
    folder.mkdir()
    vm = await factory.run("tiny", name="v", memory="96MiB")
    request = ShareRequest(host_path=str(folder), guest_path="/mnt/s")

    async def unshared() -> None:
        if await vm.shares():
            await vm.share_rm("/mnt/s")
        await let_go(factory.layout.vm(vm.id))

    async def mounted(where: str) -> None:
        (told,) = [await vm.share_add(request)]
        assert told.state == "shared", where
        assert await vm.sh("echo x >/mnt/s/x && cat /mnt/s/x; grep -c ^atoll /proc/mounts") == "x\n1", where
        assert len([argv for argv in leftovers.processes_of(home).values() if "sftp-server" in argv]) == 1, where
        assert await disagreements(factory.layout) == [], where

    action = f"await (await host.get('v')).share_add(ShareRequest(host_path={str(folder)!r}, guest_path='/mnt/s'))"
    await killed_at_each(factory, action, before=unshared, after=mounted)
