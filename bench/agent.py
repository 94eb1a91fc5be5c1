"""The agent over its socket: what listing, small requests, events and verbs take, and its memory.

`python -m bench.agent COUNT` measures for the home that ATOLL_HOME names, which has the image `tiny` and no agent, with
so many stopped VMs; JSON.
"""

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from atoll import layout as layouts
from atoll.host.sockets import address_of
from atoll.layout import Layout
from atoll.model.names import new_id
from atoll.model.vm import Vm
from atoll.platform.local import LocalHost
from atoll.platform.reach import tls_context
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place
from atoll.store.sqlite import SqliteRecords
from atoll.store.tokens import Tokens
from bench.harness import Figures, Goal

NAME = "bench-agent"
ATOLL = (str(Path(sys.executable).with_name("atoll")),)
SMALL = b"GET /v1/vms/%s/ports HTTP/1.1\r\nHost: atoll\r\n\r\n"
CONNECTIONS = 16
GOALS = {
    "agent's memory, no": (Goal(limit=90),),
    "agent's memory": (Goal(limit=150),),
    "list": (Goal(limit=10),),
    "a verb": (Goal("in this process", plus=15),),
    "event of": (Goal(limit=50),),
}
"""By how a case's name begins. Of small requests there shall be at least 1000 a second."""
READY = 60.0
ENGINE_EVENTS, ENGINE_PAUSE = 80, 0.35
"""The agent tells 50 of a guest's events at once, and then two a second."""


def fill(records: SqliteRecords, model: Vm, count: int) -> list[Vm]:
    """Records of stopped VMs like `model`, without files: listing needs none."""
    made = []
    for index in range(count):
        created = model.created_at + index
        made.append(replace(model, id=new_id(), name=f"agent-{index}", created_at=created))
        records.add_vm(made[-1])
    return made


@contextlib.contextmanager
def serving(layout: Layout, *options: str) -> Iterator[int]:
    """`atoll serve`; its pid."""
    env = os.environ | {"ATOLL_HOME": str(layout.data.parent)}
    process = subprocess.Popen([*ATOLL, "serve", "--rate", "0", *options], env=env, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        while b"listening" not in process.stderr.readline():
            if process.poll() is not None:
                raise RuntimeError("the agent ended")
        yield process.pid
    finally:
        process.terminate()
        process.wait(READY)
        process.stderr.close()


def resident(pid: int) -> float:
    """MiB of a process's own and shared pages."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def took(work: Callable[[], Awaitable[object]], times: int) -> list[float]:
    """Milliseconds of each."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        await work()
        found.append(1000 * (time.perf_counter() - began))
    return found


async def small_requests(path: Path, seconds: float, name: str = NAME) -> float:
    """Requests a second that one client with several connections gets answers to."""
    done, until = 0, time.perf_counter() + seconds

    async def ask() -> None:
        nonlocal done
        reader, writer = await asyncio.open_unix_connection(str(path))
        request = SMALL % name.encode()
        while time.perf_counter() < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode(errors="replace").partition("\r\n")[0])
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            await reader.readexactly(length)
            done += 1
        writer.close()

    await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))
    return done / seconds


async def event_delays(host: RemoteHost, records: SqliteRecords, times: int) -> tuple[list[float], list[float]]:
    """Milliseconds from an event to a client that follows, and to its being recorded for good, which is part of it."""
    found: list[float] = []
    recorded: list[float] = []
    events: AsyncIterator[object] = host.events(follow=True)
    following = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.5)
    for _ in range(times):
        began = time.perf_counter()
        await asyncio.to_thread(records.add_event, "bench.event", name=NAME, data={})
        recorded.append(1000 * (time.perf_counter() - began))
        await following
        found.append(1000 * (time.perf_counter() - began))
        following = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    return found, recorded


async def engine_delays(layout: Layout, host: RemoteHost, vm_id: str) -> list[float]:
    """Milliseconds from QEMU's own time of an event of its guest's, which is halted and goes on, to a client."""
    found: list[float] = []
    monitor = layout.vm(vm_id).socket("observe")

    async def follow() -> None:
        async for event in host.events(follow=True):
            if event.kind in ("vm.halted", "vm.continued"):
                found.append(1000 * (time.time() - event.data["at"]))
            if len(found) == ENGINE_EVENTS:
                return

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.5)
    for index in range(ENGINE_EVENTS):
        await asyncio.to_thread(tell_engine, monitor, ("stop", "cont")[index % 2])
        await asyncio.sleep(ENGINE_PAUSE)
    await asyncio.wait_for(following, READY)
    return found


def tell_engine(monitor: Path, command: str) -> None:
    """One command of QMP's, past all that is ours."""
    with address_of(monitor) as address, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        with connection.makefile("rwb") as file:
            file.readline()
            for each in ("qmp_capabilities", command):
                file.write(json.dumps({"execute": each}).encode() + b"\n")
                file.flush()
                while b'"return"' not in file.readline():
                    pass


@contextlib.contextmanager
def busy_processors() -> Iterator[None]:
    """A program for each processor that never waits."""
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for each in burning:
            each.kill()
            each.wait()


async def over_https(layout: Layout, here: LocalHost) -> dict[str, dict[str, list[float]]]:
    """A rename by a client that comes over TLS with a token, on a connection that is open, and with one of its own."""
    port = free_port()
    tokens = Tokens(layout.tokens)
    kept: dict[str, list[float]] = {"atoll": [], "in this process": []}
    anew: dict[str, list[float]] = {"atoll": [], "in this process": []}
    names = iter(f"{NAME}-{index}" for index in range(1000, 2000))
    with serving(layout, "--listen", f"127.0.0.1:{port}"):
        _, secret = tokens.create(NAME, scope="operate")
        place = Place(url=f"https://127.0.0.1:{port}", token=secret, tls=tls_context(layout.credentials / "ca.pem"))
        (info,) = [each for each in await here.ls() if each.vm.name.startswith(NAME)]
        near = await here.get(info.vm.id)
        try:
            async with RemoteHost(place) as there:
                far = await there.get(info.vm.id)
                for _ in range(20):
                    kept["atoll"] += await took(lambda: far.rename(next(names)), 1)
                    kept["in this process"] += await took(lambda: near.rename(next(names)), 1)

            async def connect_and_rename() -> None:
                async with RemoteHost(place) as there:
                    await (await there.get(info.vm.id)).rename(next(names))

            for _ in range(20):
                anew["atoll"] += await took(connect_and_rename, 1)
                anew["in this process"] += await took(lambda: near.rename(next(names)), 1)
        finally:
            tokens.rm(NAME)
    return {"a verb (rename) over HTTPS": kept, "the same, looked up, with a connection of its own": anew}


def free_port() -> int:
    """A TCP port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def p99(values: list[float]) -> list[float]:
    return [statistics.quantiles(values, n=100)[98]]


async def first_lists(place: Place, times: int) -> list[float]:
    """Milliseconds of `ls` for clients that know nothing yet, but are connected."""
    found: list[float] = []
    for _ in range(times):
        async with RemoteHost(place) as host:
            await host.get(NAME)
            found += await took(host.ls, 1)
    return found


async def measured(layout: Layout, count: int) -> dict[str, dict[str, list[float]]]:
    """Each case with what its sides took."""
    values: dict[str, dict[str, list[float]]] = {}
    with serving(layout) as pid:
        await asyncio.sleep(1)
        values["agent's memory, no VMs"] = {"atoll": [resident(pid)]}
    records = SqliteRecords(layout.database, wake=layout.wake, reserve=layout.reserve)
    async with LocalHost(layout) as here:
        model = await here.create("tiny", name=NAME)
        made = fill(records, (await model.info()).vm, count)
        with serving(layout) as pid:
            async with RemoteHost(Place(url="http://atoll", socket=str(layout.agent_socket))) as there:
                await took(there.ls, 3)
                sides = {"atoll": await took(there.ls, 40), "in this process": await took(here.ls, 40)}
                values[f"list {count} VMs over the socket"] = sides
                values["the same for a client's first time"] = {"atoll": await first_lists(there._wire.place, 20)}
                values[f"agent's memory, {count} VMs"] = {"atoll": [resident(pid)]}
                values["small requests a second"] = {"atoll": [await small_requests(layout.agent_socket, 3.0)]}
                vms = {"atoll": await there.get(NAME), "in this process": await here.get(NAME)}
                names = iter(f"{NAME}-{index}" for index in range(1000))
                renames: dict[str, list[float]] = {side: [] for side in vms}
                for _ in range(20):
                    for side, vm in vms.items():
                        renames[side] += await took(lambda vm=vm: vm.rename(next(names)), 1)  # type: ignore[misc]
                values["a verb (rename) over the socket"] = renames
                delays, recorded = await event_delays(there, records, 200)
                values["a command's event to a client, p99"] = {"atoll": p99(delays), "its record alone": p99(recorded)}
                await model.start(wait=True)
                try:
                    values["event of QEMU's to a client, p99"] = {
                        "atoll": p99(await engine_delays(layout, there, model.id))
                    }
                    with busy_processors():
                        values["the same, all processors busy, p99"] = {
                            "atoll": p99(await engine_delays(layout, there, model.id))
                        }
                finally:
                    await model.stop(force=True)
        values |= await over_https(layout, here)
        for vm in made:
            records.remove_vm(vm.id)
        await model.rm()
    records.close()
    return values


def figures(
    environment: Mapping[str, str], count: int, bindings: Mapping[str, list[float]] | None = None
) -> Iterator[Figures]:
    """The rows of the table; `bindings` is what libvirt's takes for the same list. Raises `CalledProcessError`."""
    argv = [sys.executable, "-m", "bench.agent", str(count)]
    said = subprocess.run(argv, env=environment, check=True, capture_output=True, timeout=600).stdout
    found = json.loads(said)
    if bindings:
        ours = found[f"list {count} VMs over the socket"]
        ours["virsh"] = bindings["at once"]
        found["the same, libvirt asked for each state"] = {"atoll": ours["atoll"], "virsh": bindings["one by one"]}
    for case, sides in found.items():
        goals = next((goals for begin, goals in GOALS.items() if case.startswith(begin)), ())
        unit = "MiB" if "memory" in case else "/s" if "second" in case else "ms"
        yield Figures(case=case, unit=unit, goals=goals, values=sides)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measured(layouts.find(), int(sys.argv[1])))))
