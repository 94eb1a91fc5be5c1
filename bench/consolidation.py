"""Many idle tiny VMs: what of the host's memory they take with and without consolidation, and the agent that has them.

`python -m bench.consolidation COUNT` measures for the home that ATOLL_HOME names, which has the image `tiny` and no
agent; JSON. Only root can have equal pages merged.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
from msgspec.structs import replace

from atoll import layout as layouts
from atoll.host import facts, page_merging
from atoll.layout import Layout
from atoll.model.requests import SetRequest
from atoll.model.units import MIB
from atoll.platform.local import LocalHost
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place
from atoll.store.sqlite import SqliteRecords
from bench.agent import fill, resident, serving
from bench.harness import Figures, Goal

MEMORY = "128MiB"
AT_ONCE = 3
RECORDED = 500
IDLE = "20s"
SETTLED, LONGEST = 0.01, 900.0
"""Scans have settled when a whole one saves less than a hundredth more; seconds that this may take."""
GOAL = (Goal("without", 0.5),)
Sides = dict[str, dict[str, list[float]]]


def processes_of(layout: Layout) -> list[int]:
    """QEMUs and the helpers of their networks: what was told one of this home's folders to work in."""
    told = b"ATOLL_FOLDER=" + os.fsencode(layout.run)
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(word.startswith(told) for word in (folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def proportional(pids: list[int]) -> float:
    """MiB of all together; what several have is counted once."""
    return sum(facts.memory_share(pid).proportional for pid in pids) / MIB


def available() -> float:
    """MiB that new programs could take."""
    return facts.memory().available / MIB


async def start_all(host: LocalHost, count: int) -> None:
    """So many guests that have answered once, and do nothing."""
    places = asyncio.Semaphore(AT_ONCE)

    async def start(index: int) -> None:
        async with places:
            vm = await host.create("tiny", name=f"idle-{index}", memory=MEMORY)
            await vm.start(wait=True, timeout=600)

    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(start(index))


async def remove_all(host: LocalHost) -> None:
    for info in await host.ls():
        await (await host.get(info.vm.id)).rm(force=True)


async def until_settled() -> float:
    """Seconds until a whole scan finds next to nothing more to merge."""
    began = time.perf_counter()
    scans, saved = full_scans(), 0.0
    while time.perf_counter() - began < LONGEST:
        await asyncio.sleep(1)
        # Pages are looked at once before they are merged, so a scan may begin that finds less than the next one.
        if full_scans() < scans + 2:
            continue
        now = page_merging.merged().saved
        if now and now <= saved * (1 + SETTLED):
            return time.perf_counter() - began
        scans, saved = full_scans(), now
    raise RuntimeError(f"page merging hasn't settled within {LONGEST:g} s")


def full_scans() -> int:
    return int((page_merging.KSM / "full_scans").read_text())


def scanner() -> int:
    """The kernel's thread that merges pages."""
    threads = (each for each in Path("/proc").glob("[0-9]*/comm") if each.read_text().strip() == "ksmd")
    return int(next(threads).parent.name)


async def sleeping(host: LocalHost) -> None:
    """Until all have been suspended since nobody used them; an agent is there."""
    awake = {info.vm.id for info in await host.ls()}
    last = host.services.records.last_event()
    for vm_id in awake:
        await (await host.get(vm_id)).set(SetRequest(suspend_when_idle=IDLE))
    async with asyncio.timeout(LONGEST):
        async for event in host.events(after=last):
            awake -= {event.vm_id} if event.kind == "vm.suspended" else set()
            if not awake:
                return


async def use(layout: Layout, seconds: float) -> None:
    """What an agent is asked for: lists, figures, events; as several who watch it would."""
    transport = httpx.AsyncHTTPTransport(uds=str(layout.agent_socket))
    async with (
        RemoteHost(Place(url="http://atoll", socket=str(layout.agent_socket))) as host,
        httpx.AsyncClient(transport=transport, base_url="http://atoll", timeout=60) as client,
    ):

        async def follow() -> None:
            async for _ in host.events(follow=True):
                pass

        following = [asyncio.create_task(follow()) for _ in range(3)]
        until = time.perf_counter() + seconds
        vm = await host.get("idle-0")
        while time.perf_counter() < until:
            await host.ls()
            (await client.get("/v1/vms")).raise_for_status()
            (await client.get("/metrics")).raise_for_status()
            await vm.pause()
            await vm.resume()
            await asyncio.sleep(1)
        for each in following:
            each.cancel()
        await asyncio.gather(*following, return_exceptions=True)


async def memory_of_agent(layout: Layout, host: LocalHost, running: int) -> float:
    """MiB of an agent with `RECORDED` VMs of which so many run, after a minute's use."""
    records = SqliteRecords(layout.database, wake=layout.wake, reserve=layout.reserve)
    model = replace((await (await host.get("idle-0")).info()).vm, run=None)
    made = fill(records, model, RECORDED - running)
    try:
        with serving(layout) as pid:
            await use(layout, 60)
            return resident(pid)
    finally:
        for vm in made:
            records.remove_vm(vm.id)
        records.close()


async def measured(layout: Layout, count: int) -> Sides:
    """Each case with what its sides took."""
    values: Sides = {}
    if page_merging.merged().on:
        raise RuntimeError("the kernel merges pages already, so there is nothing to compare")
    async with LocalHost(layout) as host:
        before = available()
        try:
            await start_all(host, count)
            await asyncio.sleep(10)  # what guests free, they give back within seconds
            pids = processes_of(layout)
            alone = {"pss": proportional(pids), "available": before - available()}
            values[f"{count} idle tiny VMs"] = {"atoll": [alone["pss"]]}
            values[f"agent's memory, {RECORDED} VMs, {count} of them running"] = {
                "atoll": [await memory_of_agent(layout, host, count)]
            }
            with serving(layout, "--merge-pages"):
                spent = facts.cpu_seconds(scanner())
                took = await until_settled()
                spent = facts.cpu_seconds(scanner()) - spent
                together = {"pss": proportional(pids), "available": before - available()}
            with serving(layout):
                await sleeping(host)
                await asyncio.sleep(5)  # a QEMU ends after that was recorded
                asleep = {"pss": proportional(processes_of(layout)), "available": before - available()}
                began = time.perf_counter()
                await (await host.get("idle-0")).exec(["true"])
                woken = time.perf_counter() - began
        finally:
            await remove_all(host)
    for name, found in (("the same with pages merged", together), ("the same suspended when idle", asleep)):
        values[name] = {"atoll": [found["pss"]], "without": [alone["pss"]]}
        values[f"{name}, by the host's available memory"] = {
            "atoll": [found["available"]],
            "without": [alone["available"]],
        }
    values["exec in one that sleeps"] = {"atoll": [woken]}
    values["until nothing more is merged"] = {"atoll": [took]}
    values["processor time of that"] = {"atoll": [spent]}
    return values


def figures(environment: Mapping[str, str], tell: Callable[[str], None], count: int) -> Iterator[Figures]:
    """The rows of the table; one that tells why, when they can't be had."""
    if os.geteuid() != 0 or not (page_merging.KSM / "run").exists():
        tell("Consolidation isn't measured: it takes root, and a kernel that merges pages")
        return
    tell(f"{count} idle VMs: starting them, and merging their pages, takes minutes")
    argv = [sys.executable, "-m", "bench.consolidation", str(count)]
    finished = subprocess.run(argv, env=environment, check=False, capture_output=True, timeout=3600)
    if finished.returncode != 0:
        why = finished.stderr.decode(errors="replace").strip()[-300:]
        tell(f"  failed: {why}")
        yield Figures(case=f"{count} idle tiny VMs", unit="MiB", goals=(), errors={"atoll": why})
        return
    for case, sides in json.loads(finished.stdout).items():
        seconds = case.startswith(("until", "processor", "exec"))
        goals = (Goal(limit=150),) if case.startswith("agent") else GOAL if "without" in sides else ()
        yield Figures(case=case, unit="s" if seconds else "MiB", goals=goals, values=sides)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measured(layouts.find(), int(sys.argv[1])))))
