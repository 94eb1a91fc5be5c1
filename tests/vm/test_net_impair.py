"""Cables with a delay, with real guests: what pings see, copies, and that nothing of it is left behind."""

import asyncio
import os
import re
import signal

import pytest
from tests.helpers.command import atoll
from tests.helpers.machines import Factory, Machine

from atoll.errors import InvalidInput, NotFound
from atoll.host import cables, namespace
from atoll.model.network import Network
from atoll.model.requests import ImpairRequest, NicRequest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(200)]

GOOD = ImpairRequest()


def on(network: str) -> dict[str, object]:
    return {"memory": "96MiB", "nics": (NicRequest(network=network),)}


async def ready(vm: Machine) -> str:
    """Its address, once DHCP has given it."""
    wanted = vm.record.spec.nics[0].address
    assert wanted is not None
    await vm.sh(f"for i in $(seq 100); do ip addr | grep -q {wanted}/ && exit 0; sleep 0.1; done; exit 1")
    return wanted


async def times(vm: Machine, to: str, *, count: int = 5) -> list[float]:
    """Of the round trips, in milliseconds. The first may have had to ask for a hardware address."""
    said = await vm.sh(f"ping -c {count + 1} -i 0.3 -W 5 {to}")
    return [float(time) for time in re.findall(r"time=([\d.]+) ms", said)][1:]


async def links_in(factory: Factory, network: Network) -> list[str]:
    """What the cables of a network are made of, by the first letters of their names."""
    holder = namespace.holder_of(factory.layout.network(network.id))
    assert holder is not None
    shown = (await namespace.run(holder.pid, "ip", "-o", "link")).text
    return sorted(name[0] for name in re.findall(r"^\d+: (\S+?):", shown, re.M) if name not in ("lo", "br0"))


def relays(factory: Factory, network: Network) -> list[int]:
    return [pid for pid, _ in cables.relays_of(factory.layout.network(network.id)).values()]


async def until(condition: object) -> None:
    for _ in range(200):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it didn't come to that in 4 s")


async def test_delays_duplicates_and_their_end(factory: Factory) -> None:
    lab = await factory.host.networks.create("lab")
    web, db = await factory.run("tiny", name="web", **on("lab")), await factory.run("tiny", name="db", **on("lab"))
    cache = await factory.run("tiny", name="cache", **on("lab"))
    there, third = await ready(db), await ready(cache)
    own = await ready(web)
    usual = min(await times(web, there))

    await db.net_impair(ImpairRequest(delay=0.15, jitter=0.02))
    assert await links_in(factory, lab) == ["i", "q", "r", "t", "t", "t"]
    late = await times(web, there)
    assert len(late) == 5 and min(late) >= 250 and min(late) <= usual + 800
    assert min(await times(web, third)) < 200, "others are as they were"
    (told,) = (await factory.host.networks.show("lab")).impairments
    assert told.relayed[0].delay == 0.15
    assert "delay 150ms ± 20ms" in atoll("net", "show", "lab").out

    # Towards one VM; twice; and large segments still come through.
    await db.net_impair(GOOD)
    await db.net_impair(ImpairRequest(towards="cache", delay=0.2))
    await db.net_impair(ImpairRequest(duplicate=100))
    assert min(await times(cache, there)) >= 400
    said = await web.sh(f"ping -c 3 -W 5 {there}")
    assert "(DUP!)" in said or "duplicates" in said
    assert "duplicate 100%; towards cache: delay 200ms" in atoll("net", "show", "lab").out
    await db.net_impair(ImpairRequest(delay=0.005))
    await db.sh("mkdir -p /www; head -c 3000000 /dev/urandom >/www/some; httpd -h /www")
    assert await db.sh("md5sum </www/some") == await web.sh(f"wget -qO- http://{there}/some | md5sum")

    # A guest behind a relay is nobody else, either.
    await db.sh(f"arping -U -c 2 -I eth0 -s {third} {third} >/dev/null 2>&1; true")
    assert db.record.spec.nics[0].mac not in [
        line.split()[3] for line in (await web.read("/proc/net/arp")).splitlines() if line.startswith(f"{third} ")
    ]

    # A relay that is killed: the next command mends the cable.
    (relay,) = relays(factory, lab)
    os.kill(relay, signal.SIGKILL)
    assert (await web.exec(["ping", "-c", "1", "-W", "1", there])).exit_code != 0
    (told,) = (await factory.host.networks.show("lab")).troubles
    assert "the relay of db's cable has ended" in told
    assert told in atoll("net", "show", "lab").out
    await web.net_impair(ImpairRequest(rate=10**9))
    await web.sh(f"ping -c 1 -W 5 {there}")
    assert relays(factory, lab) not in ([], [relay])

    await db.net_impair(GOOD)
    assert await links_in(factory, lab) == ["t", "t", "t"] and relays(factory, lab) == []
    assert min(await times(web, there)) < 200
    await db.sh(f"ping -c 1 -W 5 {own}")

    with pytest.raises(InvalidInput, match="no longer than the delay"):
        await db.net_impair(ImpairRequest(jitter=0.1))
    with pytest.raises(InvalidInput, match="neither a rate nor a partition"):
        await db.net_impair(ImpairRequest(towards="web", rate=1000))
    with pytest.raises(NotFound, match="isn't another VM"):
        await db.net_impair(ImpairRequest(towards="db", delay=0.1))


@pytest.mark.slow
async def test_order_copies_and_stops(factory: Factory) -> None:
    lab = await factory.host.networks.create("lab")
    web, db = await factory.run("tiny", name="web", **on("lab")), await factory.run("tiny", name="db", **on("lab"))
    there = await ready(db)
    await ready(web)
    await db.net_impair(ImpairRequest(delay=0.05, reorder=30))
    await web.sh(f"ping -c 1 -W 5 {there}")
    got = [int(number) for number in re.findall(r"seq=(\d+)", await web.sh(f"ping -c 60 -i 0.01 -W 5 {there}"))]
    assert len(got) >= 50 and got != sorted(got)

    # Snapshots and forks of it work; the copy's own cable is good.
    await db.snapshot("then")
    (fork,) = [factory.machine(vm) for vm in await db.fork(1)]
    assert min(await times(web, await ready(fork))) < 200
    assert min(await times(web, there)) >= 90
    await db.restore("then")
    await ready(db)
    assert min(await times(web, there)) >= 90

    # A VM that stops takes its relay with it; when it starts, it has one again.
    await db.stop(force=True)
    await until(lambda: relays(factory, lab) == [])
    await db.start(wait=True)
    await ready(db)
    assert min(await times(web, there)) >= 90
    assert len(relays(factory, lab)) == 1
    for vm in (fork, db, web):
        await vm.rm(force=True)
    await factory.host.networks.rm("lab")
    assert relays(factory, lab) == []
