"""What a person at the machine would do: look at the screen, press keys, read the meters. Changes no record.

These use the `observe` monitor for a few milliseconds at a time, so they work while an operation holds the VM's lock.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from atoll.errors import AtollError, EngineFailed, Unsupported
from atoll.host import facts
from atoll.host.sockets import connect
from atoll.model.state import require
from atoll.model.vm import CardStats, Stats, Vm
from atoll.operations import networks, observe
from atoll.operations.services import Services
from atoll.qemu.keys import chord, keys_of_text
from atoll.qemu.monitor import Monitor

if TYPE_CHECKING:
    from atoll.host.link_text import Counted

Answer = TypeVar("Answer")
KEY_TIME = 0.02
"""Seconds that a key is held, and paused after: emulated keyboards buffer 16 bytes and don't tell when one is lost."""
CHORDS_AT_ONCE = 5
"""Then others that look have their turn; a phase is waited for a second."""
GUEST_TIME = 2.0
"""Seconds that a guest has to tell the counters of its cards."""
LONGEST_KEY_TIME = 2.0
"""Seconds after which a key is over though the guest, on a busy computer, didn't get to run for its time."""


async def observing(services: Services, vm: Vm, ask: Callable[[Monitor], Awaitable[Answer]]) -> Answer:
    """Ask by QMP for a moment, without the VM's lock. Raises `WrongState` when it is stopped."""
    require(vm.name, observe.phase_of(services, vm), "console")

    async def work() -> Answer:
        async with Monitor(connect(services.layout.vm(vm.id).socket("observe"))) as monitor:
            return await ask(monitor)

    return await observe.aside(work)


def require_display(vm: Vm) -> None:
    """Raises `Unsupported`."""
    if vm.spec.display == "none":
        raise Unsupported(
            f"{vm.name}: it has no display",
            next_step=f"Read `atoll logs {vm.name}`; or `atoll set {vm.name} --display vga` and restart it.",
        )


async def screenshot(vm: Vm, *, services: Services) -> bytes:
    """A PNG of the screen. Raises `Unsupported` without a display, `WrongState` when it is stopped."""
    require_display(vm)
    memory = os.memfd_create("screenshot", os.MFD_CLOEXEC)
    try:
        await observing(services, vm, lambda monitor: _draw(monitor, memory))
        picture = os.pread(memory, os.fstat(memory).st_size, 0)
    finally:
        os.close(memory)
    if not picture.startswith(b"\x89PNG"):
        raise EngineFailed(
            f"{vm.name}: there is no picture", "the display hasn't been set up by the guest yet", "Try again."
        )
    return picture


async def _draw(monitor: Monitor, memory: int) -> None:
    # QEMU wants a descriptor of the very mode it would open with: write-only.
    writing = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        added = await monitor.send_descriptor("add-fd", {"opaque": "screenshot"}, writing)
        try:
            await monitor.execute("screendump", {"filename": f"/dev/fdset/{added['fdset-id']}", "format": "png"})
        finally:
            await monitor.execute("remove-fd", {"fdset-id": added["fdset-id"]})
    finally:
        os.close(writing)


async def type_text(vm: Vm, text: str, *, services: Services) -> None:
    """Type text on a US keyboard. Raises `InvalidInput`, before typing anything, for what that keyboard lacks."""
    await _press(vm, keys_of_text(text), services)


async def press(vm: Vm, keys: tuple[str, ...], *, services: Services) -> None:
    """Press chords like `ctrl-alt-delete` or `f2`, one after another. Raises `InvalidInput` for unknown keys."""
    await _press(vm, [chord(key) for key in keys], services)


async def _press(vm: Vm, chords: list[list[str]], services: Services) -> None:
    if vm.spec.display == "none" and vm.spec.machine != "q35":
        raise Unsupported(f"{vm.name}: it has no keyboard", next_step=f"Use `atoll console {vm.name}`.")
    for start in range(0, len(chords), CHORDS_AT_ONCE):
        some = chords[start : start + CHORDS_AT_ONCE]
        await observing(services, vm, partial(_press_some, vm=vm, chords=some))


async def _press_some(monitor: Monitor, vm: Vm, chords: Sequence[list[str]]) -> None:
    assert vm.run is not None
    threads = facts.threads_by_own_number(vm.run.pid)
    told = [cpu["thread-id"] for cpu in await monitor.execute("query-cpus-fast")]
    processors = [threads[number] for number in told if number in threads]
    for codes in chords:
        for down in (True, False):
            order = codes if down else codes[::-1]
            await monitor.execute("input-send-event", {"events": [_key_event(code, down) for code in order]})
            await _turn(vm, processors)


async def _turn(vm: Vm, processors: list[int]) -> None:
    """A key's time, as the guest has it: a processor that asks its keyboard without end may not get to run for long."""
    assert vm.run is not None
    before = {thread: facts.thread_ran(vm.run.pid, thread) for thread in processors}
    deadline = time.monotonic() + LONGEST_KEY_TIME
    await asyncio.sleep(KEY_TIME)
    for thread, ran in before.items():
        while ran is not None and time.monotonic() < deadline:
            now = facts.thread_ran(vm.run.pid, thread)
            if now is None or now - ran >= KEY_TIME:
                break
            await asyncio.sleep(KEY_TIME / 4)


def _key_event(code: str, down: bool) -> dict[str, Any]:
    return {"type": "key", "data": {"down": down, "key": {"type": "qcode", "data": code}}}


async def frames(vm: Vm, *, services: Services) -> tuple[int, ...]:
    """For each queue of its virtio cards the index of the last frame that was passed, which begins anew at 65536."""
    paths = [f"/machine/peripheral/nic-{nic.name}/virtio-backend" for nic in vm.spec.nics if nic.model == "virtio"]

    async def ask(monitor: Monitor) -> tuple[int, ...]:
        asked = [{"path": path, "queue": queue} for path in paths for queue in (0, 1)]
        told = [await monitor.execute("x-query-virtio-queue-status", each) for each in asked]
        return tuple(int(each["used-idx"]) for each in told)

    return await observing(services, vm, ask) if paths else ()


async def stats(vm: Vm, *, services: Services) -> Stats:
    """One reading of what a running VM uses. Raises `WrongState` when it is stopped."""
    blocks = await observing(services, vm, lambda monitor: monitor.execute("query-blockstats"))
    assert vm.run is not None
    cards = await _cards(vm, services)
    return Stats(
        at=time.time(),
        cpu_seconds=facts.cpu_seconds(vm.run.pid),
        memory_resident=facts.memory_resident(vm.run.pid),
        memory_given=vm.spec.memory,
        disk_read=sum(block["stats"]["rd_bytes"] for block in blocks),
        disk_written=sum(block["stats"]["wr_bytes"] for block in blocks),
        net_received=sum(card.received for card in cards) if cards else None,
        net_sent=sum(card.sent for card in cards) if cards else None,
        cards=cards,
    )


async def _cards(vm: Vm, services: Services) -> tuple[CardStats, ...]:
    """Taps have counters. User-mode networking has none, so the guest is asked."""
    from atoll.host import host_bridge
    from atoll.host import network as world

    counted: dict[str, Counted] = {}
    for network in networks.shared_by(vm.spec):
        here = await world.counters(services.layout.network(network))
        counted |= here or await host_bridge.counters(network)
    if any(nic.network is None for nic in vm.spec.nics):
        counted |= {mac: told for mac, told in (await _told_by_guest(vm, services)).items() if mac not in counted}
    return tuple(
        CardStats(
            nic=nic.name,
            network=nic.network,
            received=counted[nic.mac].received[0],
            sent=counted[nic.mac].sent[0],
            packets_received=counted[nic.mac].received[1],
            packets_sent=counted[nic.mac].sent[1],
        )
        for nic in vm.spec.nics
        if nic.mac in counted
    )


async def _told_by_guest(vm: Vm, services: Services) -> dict[str, "Counted"]:
    from atoll.host.link_text import Counted
    from atoll.operations import guest_setup

    if not vm.spec.guest.agent:
        return {}
    try:
        # Others may be talking to its agent, and have more time for that than whoever looks at figures.
        async with asyncio.timeout(GUEST_TIME):
            interfaces = await guest_setup.interfaces(services.layout.vm(vm.id), timeout=GUEST_TIME)
    except (AtollError, TimeoutError):
        return {}
    told = {each.get("hardware-address", ""): each.get("statistics") for each in interfaces}
    return {
        mac: Counted(received=(at["rx-bytes"], at["rx-packets"]), sent=(at["tx-bytes"], at["tx-packets"]))
        for mac, at in told.items()
        if at
    }
