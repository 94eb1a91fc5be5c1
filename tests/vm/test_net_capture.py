"""`net capture` with real guests: every kind of card, by the SDK and as a user types it, and nothing left in QEMU."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.command import ATOLL, atoll
from tests.helpers.machines import Factory, Machine

from atoll.errors import InvalidInput, NotFound, WrongState
from atoll.model.requests import CaptureRequest, NicRequest
from atoll.operations.look import observing
from atoll.qemu.monitor import Monitor

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

SMALL = "96MiB"


def read_by_tcpdump(pcap: bytes, wanted: str = "") -> str:
    done = subprocess.run(["tcpdump", "-nr-", wanted], input=pcap, capture_output=True, check=True)
    return done.stdout.decode()


async def captured(vm: Machine, request: CaptureRequest, script: str) -> bytes:
    """What passes while the guest runs this."""
    pieces: list[bytes] = []

    async def take() -> None:
        async for piece in vm.net_capture(request):
            pieces.append(piece)  # noqa: PERF401  # they are looked at as they come

    task = asyncio.create_task(take())
    while not pieces:
        await asyncio.sleep(0.01)
        assert not task.done(), task.result()
    await vm.sh(script)
    await asyncio.wait_for(task, 60)
    return b"".join(pieces)


async def filters_in(factory: Factory, vm: Machine) -> Sequence[str]:
    async def parts(monitor: Monitor) -> Any:
        return await monitor.execute("query-chardev"), await monitor.execute("qom-list", {"path": "/objects"})

    devices, objects = await observing(factory.host._services, vm.record, parts)
    return [name for name in (*(d["label"] for d in devices), *(o["name"] for o in objects)) if "capture" in name]


async def test_cards_of_both_kinds_show_what_passes(factory: Factory) -> None:
    await factory.host.networks.create("lab")
    vm = await factory.run("tiny", name="web", memory=SMALL, nics=(NicRequest(network="user"),))
    peer = await factory.run("tiny", name="peer", memory=SMALL, nics=(NicRequest(network="lab"),))
    await vm.net_attach("lab")
    there, own = peer.record.spec.nics[0].address, vm.record.spec.nics[1].address
    await vm.sh("for i in $(seq 100); do ip addr | grep -q 10.213 && exit 0; sleep 0.1; done; exit 1")

    lab = await captured(vm, CaptureRequest(network="lab", seconds=4), f"ping -c 3 {there}")
    assert f"{own} > {there}: ICMP echo request" in read_by_tcpdump(lab, "icmp")
    assert f"{there} > {own}: ICMP echo reply" in read_by_tcpdump(lab, "icmp")
    user = await captured(vm, CaptureRequest(nic="net0", count=2), "ping -c 3 -W 1 10.0.2.2; true")
    assert "10.0.2.15" in read_by_tcpdump(user) and user.startswith(b"\x4d\x3c\xb2\xa1")

    # Large frames, as guests hand them over.
    await peer.sh("mkdir -p /www; head -c 3000000 /dev/zero >/www/zeros; httpd -h /www")
    large = await captured(vm, CaptureRequest(network="lab", seconds=5), f"wget -qO /dev/null http://{there}/zeros")
    assert len(large) > 3_000_000
    assert await filters_in(factory, vm) == []

    with pytest.raises(InvalidInput, match="connected to 2 networks"):
        await captured(vm, CaptureRequest(), "true")
    with pytest.raises(NotFound, match="no card 'net7'"):
        await captured(vm, CaptureRequest(nic="net7"), "true")
    await peer.stop(force=True)
    with pytest.raises(WrongState, match="it is stopped"):
        await captured(peer, CaptureRequest(), "true")


async def test_as_a_user_types_it(factory: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vm = await factory.run("tiny", name="web", memory=SMALL)
    await vm.sh("(while :; do ping -c 1 -W 1 10.0.2.2; done) >/dev/null 2>&1 &")
    ended = await asyncio.to_thread(atoll, "net", "capture", "web", "-c", "20")
    assert (ended.code, ended.out) == (0, "web.pcap: 20 packets\n"), ended.err
    assert "ICMP echo" in read_by_tcpdump((tmp_path / "web.pcap").read_bytes())

    # Ctrl-C ends it well; what was written is whole.
    begun = subprocess.Popen([*ATOLL, "net", "capture", "web", "-w", "-"], stdout=subprocess.PIPE)
    assert begun.stdout is not None
    begin = await asyncio.to_thread(begun.stdout.read, 24)
    begun.send_signal(signal.SIGINT)
    rest = await asyncio.to_thread(begun.stdout.read)
    assert begun.wait() == 0
    read_by_tcpdump(begin + rest)
    assert await filters_in(factory, vm) == []

    # A stopped one doesn't hold the guest up; what a killed one leaves goes with the next.
    begun = subprocess.Popen([*ATOLL, "net", "capture", "web", "-w", "-"], stdout=subprocess.PIPE)
    assert begun.stdout is not None
    await asyncio.to_thread(begun.stdout.read, 24)
    begun.send_signal(signal.SIGSTOP)
    before = time.monotonic()
    await vm.sh("ping -c 20 -i 0.01 -s 60000 -W 1 10.0.2.2; true")
    assert time.monotonic() - before < 30
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    begun.stdout.close()
    assert len(await filters_in(factory, vm)) == 2
    ended = await asyncio.to_thread(atoll, "net", "capture", "web", "--seconds", "1", "-w", "other", "--format", "json")
    assert ended.code == 0 and '"lost": 0' in ended.out
    assert await filters_in(factory, vm) == []
    refused = await asyncio.to_thread(atoll, "net", "capture", "web", "-w", "/nowhere/x")
    assert refused.err.startswith("Error: can't write /nowhere/x")


@pytest.mark.slow
async def test_counters_of_cards_of_both_kinds(factory: Factory) -> None:
    lab = await factory.host.networks.create("lab")
    cards = (NicRequest(network="lab"), NicRequest(network="user"))
    vm = await factory.run("tiny", name="web", memory=SMALL, nics=cards)
    peer = await factory.run("tiny", name="peer", memory=SMALL, nics=(NicRequest(network="lab"),))
    there = peer.record.spec.nics[0].address
    await vm.sh("for i in $(seq 100); do ip addr | grep -q 10.213 && exit 0; sleep 0.1; done; exit 1")

    before = (await vm.stats()).cards
    assert [(card.nic, card.network) for card in before] == [("net0", lab.id), ("net1", None)]
    await vm.sh(f"ping -c 5 -i 0.1 -s 1000 {there}")
    after = (await vm.stats()).cards[0]
    assert after.packets_sent - before[0].packets_sent >= 5 <= after.packets_received - before[0].packets_received
    assert after.sent - before[0].sent >= 5000 <= after.received - before[0].received
    said = (await asyncio.to_thread(atoll, "top", "--once", "--cards", "web")).out.splitlines()
    assert said[0].split()[:3] == ["NAME", "CARD", "NETWORK"]
    assert [line.split()[:3] for line in said[1:]] == [["web", "net0", "lab"], ["web", "net1", "user"]]
    assert '"packets_sent":' in (await asyncio.to_thread(atoll, "top", "--once", "--format", "json", "web")).out
