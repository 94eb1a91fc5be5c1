"""share add, share rm; and mounting what a machine that runs is to have

    add      check ─ plug a port, if it runs (undo: unplug) ─ record (point of no return) ─ mount
    rm       unmount and unplug, if it runs (undo: plug; it is mounted at the next exec) ─ record (point of no return)

A port has nobody behind it until the guest is about to mount. Whenever a machine begins to run (a boot, memory of its
own or another's), each share gets a new server and is mounted anew: so a snapshot needn't touch the running machine,
and what its memory knows of a server is never said to another one.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AtollError, EngineFailed, GuestFailed, NotFound
from atoll.host import cgroups, facts, files, folder_server
from atoll.host.jail import ServedFolder
from atoll.model.requests import ShareRequest
from atoll.model.spec import ShareSpec, VmSpec
from atoll.model.state import Phase, require
from atoll.model.vm import Change, Vm
from atoll.operations import guest_mount, observe, shares
from atoll.operations.boot import kill
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.power import control
from atoll.operations.services import Services
from atoll.qemu import devices
from atoll.qemu.monitor import Monitor

TRIES = 200
"""To take a port's character device away, with 10 ms in between."""
READY_TIME = 300.0
"""Seconds that a guest has to boot until its folders are mounted."""


class ShareChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    share: ShareSpec


async def add(vm: Vm, request: ShareRequest, *, services: Services) -> ShareSpec:
    """Share a further folder, at once if it runs; one that is shared there already is mounted anew.

    Raises `InvalidInput`, `AlreadyExists`, `Unsupported`, `GuestFailed`.
    """
    shares.check_agent(vm.spec, vm.name)
    wanted = shares.share(request, ())
    for each in shares.all_shares(vm):
        if replace(each, number=wanted.number) == wanted:
            await mount_all(services, vm)
            return each
    change = ShareChange(vm_id=vm.id, share=shares.share(request, shares.all_shares(vm)))
    await perform(ADD, change, services=services, subject=vm.id, subject_name=vm.name)
    await mount_all(services, services.vm(vm.id))
    return change.share


async def remove(vm: Vm, guest_path: str, *, services: Services) -> Change:
    """Take a share away; programs that have files open there get errors. Raises `NotFound`, `GuestFailed`."""
    there = [each for each in shares.all_shares(vm) if each.host_path]
    share = next((each for each in there if each.guest_path == guest_path.rstrip("/")), None)
    if share is None:
        has = ", ".join(each.guest_path for each in there) or "none"
        raise NotFound(f"{vm.name} shares nothing at '{guest_path}'", f"its shares: {has}")
    change = ShareChange(vm_id=vm.id, share=share)
    context = await perform(REMOVE, change, services=services, subject=vm.id, subject_name=vm.name)
    busy = "programs had files open there, and get errors now" if context.notes.get("busy") else ""
    return Change(name=share.guest_path, value="removed", when="now", why=busy)


async def mount_all(services: Services, vm: Vm, *, others: bool = False) -> None:
    """Mount what a running machine shares and hasn't mounted; waits until its agent answers. With `others` its memory
    may have further ones, which are unmounted.

    Each is tried; then the first error is raised. The machine runs on.
    """
    if not (others or _missing(services, vm)) or observe.phase_of(services, vm) is not Phase.RUNNING:
        return
    from atoll.operations.ready import wait

    await wait(vm, "ready", services=services, timeout=READY_TIME)
    failures: list[AtollError] = []
    async with services.lease(vm.id, what=vm.name):
        vm = services.vm(vm.id)
        missing = _missing(services, vm)
        for share in missing:
            await _end_server(services, vm, share)
        kept = [share for share in vm.spec.shares if share.host_path and share not in missing]
        await guest_mount.drop(services.layout.vm(vm.id), vm.name, keep=kept)
        for share in missing:
            try:
                await _mount(services, vm, share)
            except AtollError as error:
                failures.append(error)
                services.records.add_event("vm.share-failed", vm_id=vm.id, name=vm.name, data={"error": error.text})
    if failures:
        raise failures[0]


def _missing(services: Services, vm: Vm) -> list[ShareSpec]:
    paths = services.layout.vm(vm.id)
    return [each for each in vm.spec.shares if each.host_path and not shares.is_mounted(paths, each)]


async def mount_each(services: Services, vms: Sequence[Vm]) -> None:
    """The same for several machines at once; what fails is told by `show` and `events`."""
    await asyncio.gather(*(mount_all(services, vm) for vm in vms if vm.spec.shares), return_exceptions=True)


async def _mount(services: Services, vm: Vm, share: ShareSpec) -> None:
    """A new server behind the port, and the guest on it."""
    paths = services.layout.vm(vm.id)
    files.make_folder(paths.logs)
    wanted = ServedFolder(path=share.host_path, read_only=share.read_only)
    served = folder_server.serve(wanted, log=paths.share_log, groups=cgroups.entrances(vm.id))
    with served.link:
        folder = shares.folder_at(share.host_path) or (0, 0)
        server = shares.Server(process=served.process, at=time.time(), folder=folder)
        files.write_atomically(paths.share(share.number), msgspec.json.encode(server))
        async with control(services, vm) as monitor:
            await _connect(monitor, share, served.link.fileno())
    await guest_mount.mount(paths, vm.name, share)
    files.write_atomically(paths.share(share.number), msgspec.json.encode(replace(server, mounted=True)))


async def _connect(monitor: Monitor, share: ShareSpec, link: int) -> None:
    name = devices.share_name(share)
    await monitor.send_descriptor("getfd", {"fdname": name}, link)
    socket = {"addr": {"type": "fd", "data": {"str": name}}, "server": False}
    await monitor.execute("chardev-change", {"id": name, "backend": {"type": "socket", "data": socket}})


async def _end_server(services: Services, vm: Vm, share: ShareSpec) -> None:
    paths = services.layout.vm(vm.id)
    server = shares.server_of(paths, share)
    if server is not None and facts.is_alive(server.process):
        await kill(server.process.pid)
    paths.share(share.number).unlink(missing_ok=True)


async def plug_missing(services: Services, vm: Vm, *, there: Sequence[ShareSpec], wanted: Sequence[ShareSpec]) -> None:
    """Give a machine whose memory was just loaded the ports that it lacks. Those that it has too many stay until it
    boots: QEMU crashes when a port of that memory goes before the guest has run.
    """
    numbers = {share.number for share in there}
    missing = [share for share in wanted if share.number not in numbers]
    if missing:
        async with control(services, vm) as monitor:
            for share in missing:
                await _plug_into(monitor, share)


def _runs(context: Context[ShareChange]) -> bool:
    return observe.phase_of(context.services, context.vm) in (Phase.RUNNING, Phase.PAUSED)


def _put(context: Context[ShareChange], *share: ShareSpec) -> None:
    """Record it as it is now, or that there is none."""
    vm, number = context.vm, context.request.share.number

    def changed(spec: VmSpec) -> VmSpec:
        return replace(spec, shares=(*(each for each in spec.shares if each.number != number), *share))

    pending = None if vm.pending is None else changed(vm.pending)
    context.services.records.put_vm(replace(vm, spec=changed(vm.spec), pending=pending))


async def _check(context: Context[ShareChange]) -> None:
    """A step of its own, without undo: a port that is there isn't taken away."""
    vm, share = context.vm, context.request.share
    require(vm.name, observe.phase_of(context.services, vm), "disk")
    for each in shares.all_shares(vm):
        if share.number == each.number or (each.host_path and share.guest_path == each.guest_path):
            raise NotFound(f"{vm.name}: another command has just shared a folder", next_step="Try again.")


async def _plug(context: Context[ShareChange]) -> None:
    share = context.request.share
    if not _runs(context):
        return
    async with control(context.services, context.vm) as monitor:
        await _unplug_from(monitor, share)
        await _plug_into(monitor, share)


async def _unplug(context: Context[ShareChange]) -> None:
    """What isn't there is fine."""
    if _runs(context):
        async with control(context.services, context.vm) as monitor:
            await _unplug_from(monitor, context.request.share)


async def _plug_into(monitor: Monitor, share: ShareSpec) -> None:
    await monitor.execute("chardev-add", {"id": devices.share_name(share), "backend": {"type": "null", "data": {}}})
    await monitor.execute("device_add", devices.share_port(share))


async def _unplug_from(monitor: Monitor, share: ShareSpec) -> None:
    """What isn't there is fine."""
    with contextlib.suppress(EngineFailed):
        await monitor.execute("device_del", {"id": devices.share_port_id(share)})
    # The port lets go of its character device a moment later, and there is no event for that.
    for _ in range(TRIES):
        there: list[dict[str, Any]] = await monitor.execute("query-chardev")
        if all(each["label"] != devices.share_name(share) for each in there):
            return
        with contextlib.suppress(EngineFailed):
            await monitor.execute("chardev-remove", {"id": devices.share_name(share)})
        await asyncio.sleep(0.01)
    raise EngineFailed(f"QEMU doesn't let go of the port of {share.guest_path}", next_step="Try again.")


async def _record(context: Context[ShareChange]) -> None:
    _put(context, context.request.share)
    vm, share = context.vm, context.request.share
    data = {"here": share.host_path, "guest": share.guest_path}
    context.services.records.add_event("vm.share-added", vm_id=vm.id, name=vm.name, data=data)


async def _unmount(context: Context[ShareChange]) -> None:
    vm, share = context.vm, context.request.share
    require(vm.name, observe.phase_of(context.services, vm), "disk")
    if observe.phase_of(context.services, vm) is Phase.RUNNING:
        # A guest that doesn't answer keeps a dead folder; it isn't asked whether it may be taken away.
        kept = [each for each in vm.spec.shares if each != share]
        with contextlib.suppress(GuestFailed):
            busy = await guest_mount.drop(context.services.layout.vm(vm.id), vm.name, keep=kept, timeout=5)
            context.notes["busy"] = share.guest_path in busy
    await _end_server(context.services, vm, share)
    if observe.phase_of(context.services, vm) is Phase.PAUSED:
        context.notes["port stays"] = True
        return
    await _unplug(context)


async def _record_removed(context: Context[ShareChange]) -> None:
    vm, share = context.vm, context.request.share
    _put(context, *([replace(share, host_path="")] if context.notes.get("port stays") else []))
    data = {"guest": share.guest_path}
    context.services.records.add_event("vm.share-removed", vm_id=vm.id, name=vm.name, data=data)


ADD = Verb(
    name="share add",
    request=ShareChange,
    steps=(Step("check", _check), Step("plug", _plug, _unplug), Step("record", _record, final=True)),
)
REMOVE = Verb(
    name="share rm",
    request=ShareChange,
    steps=(Step("unmount", _unmount, _plug), Step("record", _record_removed, final=True)),
)
