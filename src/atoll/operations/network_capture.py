"""What passes through a VM's card, as a pcap file. Changes no record, and needs no lock.

QEMU is given a filter on the card that shows us each frame (`host/mirror.py`), and loses it at the end. What a killed
command has left there is harmless: it goes when the next one comes, or with QEMU.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

from atoll.errors import AtollError, EngineFailed, InvalidInput, NotFound
from atoll.host import facts, mirror
from atoll.host.watch import wait_for_exit
from atoll.model.requests import CaptureRequest
from atoll.model.spec import NicSpec
from atoll.model.vm import Vm
from atoll.operations.look import observing
from atoll.operations.networks import card_of
from atoll.operations.services import Services
from atoll.qemu.monitor import Monitor

MARK = "capture-"
"""Before the pid of who captures and when that started, in the names that QEMU knows a capture by."""
_LOOK = 1.0
"""Seconds between two looks whether QEMU still shows us frames: nothing tells when it doesn't."""


async def capture(
    vm: Vm, request: CaptureRequest, *, services: Services, on_lost: Callable[[int], None] | None = None
) -> AsyncIterator[bytes]:
    """The file's header, then a record for each frame, until the VM stops or its card goes, or it is enough.

    Raises `WrongState` when it is stopped, `NotFound` (a card), `InvalidInput`.
    """
    if min(request.count or 1, request.seconds or 1) <= 0:
        raise InvalidInput(
            "there is nothing to capture",
            "both count and seconds begin at one",
            "Leave them away to capture until Ctrl-C.",
        )
    nic = card_of(services, vm, network=request.network, name=request.nic)
    deadline = None if request.seconds is None else time.monotonic() + request.seconds
    left, again = request.count, False
    while True:
        try:
            async with _mirrored(services, vm, nic) as reader:
                if not again:
                    yield mirror.pcap_header()
                with _telling(reader, on_lost):
                    async with contextlib.aclosing(_frames(vm, reader, deadline)) as frames:
                        async for frame in frames:
                            yield mirror.pcap_record(frame)
                            left = None if left is None else left - 1
                            if left == 0:
                                return
        except AtollError:
            if not again:
                raise
            return
        if vm.run is None or not facts.is_alive(vm.run) or (deadline and time.monotonic() >= deadline):
            return
        # QEMU hangs up when a guest sends a frame that is larger than a message can be; it isn't let off by that.
        again = True


@contextlib.contextmanager
def _telling(reader: mirror.Reader, on_lost: Callable[[int], None] | None) -> Iterator[None]:
    try:
        yield
    finally:
        if reader.lost and on_lost is not None:
            on_lost(reader.lost)


@contextlib.asynccontextmanager
async def _mirrored(services: Services, vm: Vm, nic: NicSpec) -> AsyncIterator[mirror.Reader]:
    own = facts.identity_of(os.getpid())
    assert own is not None
    name = f"{MARK}{own.pid}-{own.start_time}-{secrets.token_hex(4)}"
    ours, theirs = mirror.link()
    with ours:
        try:
            with theirs:
                await observing(services, vm, lambda monitor: _add(monitor, name, nic, theirs.fileno()))
            yield mirror.Reader(ours)
        finally:
            with contextlib.suppress(AtollError, OSError):
                await observing(services, services.vm(vm.id), lambda monitor: _remove(monitor, name))


async def _add(monitor: Monitor, name: str, nic: NicSpec, socket: int) -> None:
    await _mend(monitor)
    await monitor.send_descriptor("getfd", {"fdname": name}, socket)
    where = {"addr": {"type": "fd", "data": {"str": name}}, "server": False}
    await monitor.execute("chardev-add", {"id": name, "backend": {"type": "socket", "data": where}})
    wanted = {"qom-type": "filter-mirror", "id": f"{name}-filter", "netdev": f"net-{nic.name}", "outdev": name}
    try:
        await monitor.execute("object-add", wanted | {"queue": "all", "vnet_hdr_support": True})
    except EngineFailed as error:
        raise NotFound("the card is gone", str(error), "`atoll show` tells those that there are.") from error


async def _remove(monitor: Monitor, name: str) -> None:
    """What isn't there is fine: a filter goes with its card."""
    for command, thing in (("object-del", f"{name}-filter"), ("chardev-remove", name)):
        with contextlib.suppress(EngineFailed):
            await monitor.execute(command, {"id": thing})


async def _mend(monitor: Monitor) -> None:
    """Remove what commands that were killed have left."""
    for each in await monitor.execute("query-chardev"):
        name = str(each["label"])
        if name.startswith(MARK):
            pid, start_time, _ = name.removeprefix(MARK).split("-")
            who = facts.ProcessIdentity(pid=int(pid), start_time=int(start_time), boot_id=facts.boot_id())
            if not facts.is_alive(who):
                await _remove(monitor, name)


async def _frames(vm: Vm, reader: mirror.Reader, deadline: float | None) -> AsyncGenerator[mirror.Frame, None]:
    """Until QEMU has hung up or ended, or the time is over."""
    assert vm.run is not None
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    gone = asyncio.ensure_future(wait_for_exit(vm.run.pid))
    gone.add_done_callback(lambda _: arrived.set())
    loop.add_reader(reader.socket, arrived.set)
    try:
        while True:
            arrived.clear()
            last_look = gone.done() or mirror.is_cut(reader.socket)
            for frame in reader.waiting():
                yield frame
            rest = _LOOK if deadline is None else min(_LOOK, deadline - time.monotonic())
            if last_look or rest <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await arrived.wait()
    finally:
        loop.remove_reader(reader.socket)
        gone.cancel()
