"""A QEMU for a VM: planned, launched, greeted, loaded with memory if it has some to go on from; and ended."""

import asyncio
import contextlib
import os
import shlex
import signal
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from atoll.errors import EngineFailed
from atoll.host import cgroups, facts, files, user_network
from atoll.host.launch import launch
from atoll.host.sandbox import Wanted, own_ids, prepare, without_user
from atoll.host.sockets import connect
from atoll.layout import VmPaths
from atoll.model.isolation import Barrier
from atoll.model.launch import LaunchPlan, UserNetwork
from atoll.model.spec import Arch, VmSpec
from atoll.model.state import Phase, phase_of_run_state
from atoll.model.vm import Run, Vm
from atoll.operations import bells, limits, networks, observe, shares
from atoll.operations.check_ports import check_port_free
from atoll.operations.create import firmware_for
from atoll.operations.descriptors import hand_over, set_path
from atoll.operations.guest_settle import leave_word
from atoll.operations.services import Report, Services
from atoll.qemu import jobs, mapped_ram
from atoll.qemu.devices import network_descriptor
from atoll.qemu.monitor import Monitor
from atoll.qemu.plan import PlanInputs, PrivateRam, plan

GREETING_TIME = 60.0
"""Seconds until QEMU must have opened everything and answered; many starting at once on two cores take a while."""


HELPER_TIME = 5.0
"""Seconds after which a helper that doesn't notice that its QEMU is gone is killed."""

RAM_BASE: dict[Arch, int] = {"x86_64": 0, "aarch64": 1 << 30, "riscv64": 1 << 31}
"""Where RAM begins in the guest's physical memory (hw/arm/virt.c, hw/riscv/virt.c in QEMU's source)."""


@dataclass(frozen=True)
class Incoming:
    """What a machine goes on from, in place of booting."""

    stream: Path
    """RAM and devices as a `mapped-ram` stream; devices only, with `ram`."""
    ram: PrivateRam | None = None


async def make_plan(
    services: Services, vm: Vm, spec: VmSpec, *, incoming: Incoming | None = None
) -> tuple[LaunchPlan, str]:
    """The plan for this VM on this host as it is now, and the accelerator it is for."""
    caps = await services.capabilities(spec.arch)
    accelerator = await services.accelerator(spec.accelerator, caps)
    layers = {layer.id: layer for layer in services.records.layers()} if any(d.layer for d in spec.disks) else {}
    inputs = PlanInputs(
        vm=vm,
        spec=spec,
        caps=caps,
        accelerator=accelerator,
        layout=services.layout,
        layers=layers,
        firmware=await firmware_for(spec),
        seed=services.layout.vm(vm.id).seed.exists() and not vm.seeded,
        incoming=incoming is not None,
        ram=incoming.ram if incoming is not None else None,
    )
    return plan(inputs), accelerator


async def boot(
    services: Services,
    vm: Vm,
    spec: VmSpec,
    *,
    report: Report,
    incoming: Incoming | None = None,
    kept: bells.Kept | None = None,
) -> Run:
    """Start a QEMU for the VM; with `incoming` it has that memory and stands still, with `kept` these networks.

    Raises `EngineFailed`, `AlreadyExists` (a port), `Busy` (more memory than may be promised). A QEMU that fails after
    its start is there still: `kill_strays`.
    """
    if services.promises is None:
        return await _boot(services, vm, spec, report=report, incoming=incoming, kept=kept)
    with services.promises.given(vm, spec.memory, services.records.vms()) as started:
        run = await _boot(services, vm, spec, report=report, incoming=incoming, kept=kept)
        started.append(run)
        return run


async def _boot(
    services: Services,
    vm: Vm,
    spec: VmSpec,
    *,
    report: Report,
    incoming: Incoming | None,
    kept: bells.Kept | None,
) -> Run:
    had = kept.descriptors if kept is not None else {}
    steps, accelerator = await make_plan(services, vm, spec, incoming=incoming)
    paths = services.layout.vm(vm.id)
    _prepare(paths, steps)
    if incoming is not None and spec.guest.agent:
        leave_word(paths, time=True)
    for nic in spec.nics:
        for port in nic.ports if nic.network is None and network_descriptor(nic) not in had else ():
            check_port_free(vm.name, port)
    jail, isolation = prepare(steps.binary, _wanted(vm, spec, steps))
    if kept is not None:
        bells.give(kept, paths, spec.nics, groups=jail.groups if jail is not None else ())
    async with networks.taps(services, vm, spec, had=had) as given:
        given = had | given
        launched = launch(steps, log=paths.qemu_log, jail=jail, strict=spec.isolation == "strict", given=given)
    if launched.no_ids:
        isolation = without_user(isolation, launched.no_ids)
    identity = facts.identity_of(launched.pid)
    version = await _greet(vm, spec, incoming, report, paths)
    if identity is None:
        raise _start_failure(vm, paths, "it ended at once")
    return Run(
        pid=identity.pid,
        start_time=identity.start_time,
        boot_id=identity.boot_id,
        started_at=time.time(),
        accelerator=accelerator,
        qemu_version=version,
        isolation=replace(
            isolation,
            barriers=(
                *isolation.barriers,
                *_helpers(steps, (*launched.weaker, *(kept.weaker if kept is not None else ()))),
            ),
        ),
        from_memory=incoming is not None,
    )


def _helpers(steps: LaunchPlan, weaker: tuple[str, ...]) -> tuple[Barrier, ...]:
    """What keeps in the programs that serve its network cards."""
    if not any(isinstance(network, UserNetwork) for network in steps.networks):
        return ()
    why = "; ".join(weaker) or "slirp4netns: its own root, filters of system calls and of frames"
    return (Barrier(name="network helper", holds=not weaker, why=why),)


def _wanted(vm: Vm, spec: VmSpec, steps: LaunchPlan) -> Wanted:
    return Wanted(
        id=vm.id,
        level=spec.isolation,
        memory=steps.memory,
        # QEMU's pool for disks has 64 threads; migration, snapshots and its timers take a few.
        threads=256 + 2 * spec.cpu.maximum,
        cpus=limits.processors(spec),
        cpus_limited=bool(spec.limits.cpus),
        guest_data=max([spec.memory, *(disk.size for disk in spec.disks)]),
    )


def _prepare(paths: VmPaths, steps: LaunchPlan) -> None:
    """The folders, fresh logs (the last run's keep the ending `.1`), and the command line for people to read."""
    files.make_folder(paths.run)
    files.make_folder(paths.logs)
    for log in (paths.serial_log, paths.qemu_log, paths.event_log):
        with contextlib.suppress(FileNotFoundError):
            log.replace(log.with_name(f"{log.name}.1"))
    files.write_atomically(paths.command_line, (shlex.join([steps.binary, *steps.argv]) + "\n").encode())


async def _greet(vm: Vm, spec: VmSpec, incoming: Incoming | None, report: Report, paths: VmPaths) -> str:
    """Wait for QEMU's greeting (the socket was listening before it started), load what comes in, see that it stands."""
    try:
        async with Monitor(connect(paths.socket("control")), timeout=GREETING_TIME) as monitor:
            version = await monitor.execute("query-version")
            if spec.limits.io_bytes or spec.limits.io_operations:
                await limits.hold_back_disks(monitor, spec.limits)
            if incoming is not None:
                await _load(monitor, incoming, spec, report)
            status = await monitor.execute("query-status")
    except (EngineFailed, OSError) as error:
        raise _start_failure(vm, paths, str(error)) from error
    phase = phase_of_run_state(status["status"])
    if phase not in (Phase.RUNNING, Phase.PAUSED) and incoming is None:
        raise _start_failure(vm, paths, f"its state is {status['status']}")
    number = version["qemu"]
    return f"{number['major']}.{number['minor']}.{number['micro']}"


async def _load(monitor: Monitor, incoming: Incoming, spec: VmSpec, report: Report) -> None:
    number = await hand_over(monitor, incoming.stream, "read", name="memory")
    mapped = await asyncio.to_thread(mapped_ram.is_mapped, incoming.stream)
    if mapped and not await jobs.supports_mapped(monitor):
        raise EngineFailed(
            "this QEMU can't load the memory", "a newer one saved it", "Upgrade QEMU, or use `restore --disk-only`."
        )
    async with (
        jobs.capabilities(monitor, jobs.WHOLE_MEMORY if mapped else ()),
        jobs.migration_events(monitor) as events,
        _networks_of_the_past(monitor, spec),
    ):
        await monitor.execute("migrate-incoming", {"uri": f"file:{set_path(number)}"})
        await jobs.until_ended(monitor, events, report=report, step="load the memory")
    await monitor.execute("remove-fd", {"fdset-id": number})
    if incoming.ram is not None:
        await _check_kept(monitor, incoming.ram, spec.arch)


@contextlib.asynccontextmanager
async def _networks_of_the_past(monitor: Monitor, spec: VmSpec) -> AsyncIterator[None]:
    """User-mode networks of QEMU's own, with nothing on them, while memory is loaded: when they were what NICs had,
    their state was saved with it, and QEMU refuses what it has no place for. They cost a millisecond.
    """
    names = [f"past-{nic.name}" for nic in spec.nics]
    # A QEMU that was built without them never had them.
    with contextlib.suppress(EngineFailed):
        for name in names:
            await monitor.execute("netdev_add", {"type": "user", "id": name, "restrict": True})
    yield
    with contextlib.suppress(EngineFailed):
        for name in names:
            await monitor.execute("netdev_del", {"id": name})


async def _check_kept(monitor: Monitor, ram: PrivateRam, arch: Arch) -> None:
    """That loading has left the mapped RAM alone: no page of it was in the stream, and none may have been cleared."""
    sample = await asyncio.to_thread(mapped_ram.first_word, Path(ram.path))
    if sample is None:
        return
    offset, word = sample
    said = str(
        await monitor.execute("human-monitor-command", {"command-line": f"xp /1gx {RAM_BASE[arch] + offset:#x}"})
    )
    if f"{word:#018x}" not in said:
        raise EngineFailed("this QEMU clears RAM that a stream doesn't have", f"it says {said.strip()}")


def _start_failure(vm: Vm, paths: VmPaths, otherwise: str) -> EngineFailed:
    said = observe.last_words(paths) or otherwise
    return EngineFailed(f"{vm.name}: QEMU ended at its start", said, f"Its command line is in {paths.command_line}.")


def engines_of(vm: Vm) -> list[int]:
    """The pids of the QEMUs that were started for the VM, recorded or not."""
    ids = own_ids(vm.id)
    return facts.scan_for(vm.uuid, after="-uuid", also_user=ids.user if ids else None)


async def kill_strays(services: Services, vm: Vm, *, kept: Collection[str] = ()) -> None:
    """End each QEMU that was started for the VM, but isn't recorded, and what was started for that one; also the
    networks that the agent keeps up for it, but for those of these cards, which the caller has taken.

    Returns when they are gone, and the ports with them.
    """
    await bells.silence(services.layout.vm(vm.id))
    recorded = vm.run.pid if vm.run is not None and facts.is_alive(vm.run) else None
    for pid in engines_of(vm):
        if pid != recorded:
            await kill(pid)
    for link in services.layout.vm(vm.id).run.glob("*.net/link"):
        user_network.let_go(link)
    if recorded is None:
        await helpers_ended(services, vm, kept=kept)
    cgroups.remove(vm.id)


async def helpers_ended(services: Services, vm: Vm, *, kept: Collection[str] = ()) -> None:
    """After QEMU has gone: until its helpers are gone as well, for they still have its ports and are in its control
    group; and what bridges have.
    """
    from atoll.host.watch import wait_for_exit

    paths = services.layout.vm(vm.id)
    controls = [each for each in paths.run.glob("*.net/control") if each.parent.stem not in kept]
    found = [user_network.helper_of(control) for control in controls]
    servers = [server for each in shares.all_shares(vm) if (server := shares.server_of(paths, each))]
    found += [server.process.pid for server in servers if facts.is_alive(server.process)]
    for pid in found:
        if pid is None:
            continue
        try:
            await asyncio.wait_for(wait_for_exit(pid), HELPER_TIME)
        except TimeoutError:
            await kill(pid)
    await networks.mend_bridges(services, networks.shared_by(vm.spec))


async def kill(pid: int) -> None:
    """SIGKILL by pidfd, so that no later process of the same pid is hit, and wait for the end (a few ms)."""
    from atoll.host.watch import wait_for_exit

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    finally:
        os.close(descriptor)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(wait_for_exit(pid), 30)
