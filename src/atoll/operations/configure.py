"""set

step      do                                                     undo
apply     what can change live: CPUs, the balloon, limits        balloon and limits back (added CPUs stay until restart)
record    the new values, for now or for the next start          (point of no return)
tell      rules of networks that mean it by a label that changed
"""

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AtollError, InvalidInput, TimedOut
from atoll.model import supervision
from atoll.model.requests import SetRequest
from atoll.model.spec import LimitSpec, VmSpec
from atoll.model.state import Phase
from atoll.model.units import format_size
from atoll.model.vm import Change, Vm
from atoll.operations import disk, guest_setup, limits, networks, observe, resolve
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.power import control
from atoll.operations.services import Services
from atoll.qemu import devices
from atoll.qemu.monitor import Monitor

ANSWER_TIME = 5.0
"""Seconds that a guest has to deal with a CPU that is plugged in."""


class ConfigureRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    change: SetRequest
    """Applied to the record as it is under the lock: what others changed meanwhile stays."""


async def configure(vm: Vm, request: SetRequest, *, services: Services) -> list[Change]:
    """Change settings; each is told with when it holds. Raises `InvalidInput` before anything is changed."""
    spec = _changed(vm.pending or vm.spec, request)
    _changed_labels(vm.labels, request)
    _supervised(vm, request)
    first = next((each.name for each in spec.disks if each.blob is None), "")
    if request.disk_size is not None:
        if not first:
            raise InvalidInput(
                f"{vm.name}: it has no disk that can grow", next_step=f"Add one with `atoll disk add {vm.name}`."
            )
        disk.check_growth(vm, first, request.disk_size)
    wanted = ConfigureRequest(vm_id=vm.id, change=request)
    context = await perform(SET, wanted, services=services, subject=vm.id, subject_name=vm.name)
    changes = msgspec.convert(context.notes["changes"], list[Change])
    if request.disk_size is not None:
        changes.append(await disk.resize_disk(services.vm(vm.id), first, request.disk_size, services=services))
    return changes


def _changed_labels(labels: dict[str, str], request: SetRequest) -> dict[str, str]:
    changed = {key: value for key, value in {**labels, **request.labels}.items() if value is not None}
    return resolve.check_labels(changed)


def _supervised(vm: Vm, request: SetRequest) -> Vm:
    """The VM with what its agent is to do with it."""
    changed = replace(
        vm,
        restart=vm.restart if request.restart is None else request.restart,
        autostart=vm.autostart if request.autostart is None else request.autostart,
        boot_order=vm.boot_order if request.boot_order is None else request.boot_order,
        memory_min=resolve.check_floor(
            _memory_after(vm, request), vm.memory_min if request.memory_min is None else request.memory_min
        ),
        on_memory_pressure=request.on_memory_pressure or vm.on_memory_pressure,
    )
    supervision.check(restart=changed.restart, boot_order=changed.boot_order, throwaway=changed.remove_when_stopped)
    return changed


def _memory_after(vm: Vm, request: SetRequest) -> int:
    return (vm.pending or vm.spec).memory if request.memory is None else resolve.check_memory(request.memory)


def _changed(spec: VmSpec, request: SetRequest) -> VmSpec:
    cpu = replace(
        spec.cpu,
        count=request.cpus if request.cpus is not None else spec.cpu.count,
        maximum=max(request.max_cpus or spec.cpu.maximum, request.cpus or 1)
        if request.max_cpus is None
        else request.max_cpus,
        model=request.cpu_model or spec.cpu.model,
    )
    resolve.check_cpu(cpu)
    boot = spec.boot
    if request.cmdline is not None:
        if boot.firmware != "kernel":
            raise InvalidInput("--cmdline needs a kernel that is booted directly", f"this VM boots by {boot.firmware}")
        boot = replace(boot, cmdline=resolve.check_cmdline(request.cmdline))
    changed = replace(
        spec,
        cpu=cpu,
        boot=boot,
        memory=spec.memory if request.memory is None else resolve.check_memory(request.memory),
        display=request.display or spec.display,
        accelerator=request.accelerator or spec.accelerator,
        isolation=request.isolation or spec.isolation,
        limits=limits.changed(spec.limits, request),
        guest=spec.guest if request.agent is None else replace(spec.guest, agent=request.agent),
    )
    return replace(changed, addresses=devices.assign_addresses(changed))


SETTINGS: dict[str, Callable[[VmSpec], str | int]] = {
    "cpus": lambda spec: spec.cpu.count,
    "max-cpus": lambda spec: spec.cpu.maximum,
    "cpu-model": lambda spec: spec.cpu.model,
    "memory": lambda spec: spec.memory,
    "display": lambda spec: spec.display,
    "accelerator": lambda spec: spec.accelerator,
    "isolation": lambda spec: spec.isolation,
    "cpu-limit": lambda spec: f"{spec.limits.cpus:g}",
    "io-limit": lambda spec: f"{format_size(spec.limits.io_bytes)}/s",
    "iops-limit": lambda spec: spec.limits.io_operations,
    "agent": lambda spec: str(spec.guest.agent).lower(),
    "cmdline": lambda spec: spec.boot.cmdline,
}


def _told(before: VmSpec, after: VmSpec, *, running: VmSpec | None, live: dict[str, str]) -> list[Change]:
    """A `Change` for each setting that differs. `live` has what was tried live: nothing if done, else why not."""
    changes = []
    for name, of in SETTINGS.items():
        if of(before) == of(after):
            continue
        why = "" if name == "agent" else live.get(name, "it can't change while the guest runs")
        if running is None or (name not in live and of(running) == of(after)):
            why = ""
        value = format_size(after.memory) if name == "memory" else str(of(after))
        changes.append(Change(name=name, value=value, when="next-start" if why else "now", why=why))
    return changes


def _told_labels(before: dict[str, str], after: dict[str, str]) -> list[Change]:
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    return [Change(name=f"label {key}", value=after.get(key, ""), when="now") for key in keys]


def _told_supervision(before: Vm, after: Vm) -> list[Change]:
    settings = (
        ("restart", before.restart, after.restart),
        ("autostart", str(before.autostart).lower(), str(after.autostart).lower()),
        ("boot-order", str(before.boot_order), str(after.boot_order)),
        ("memory-min", _told_floor(before), _told_floor(after)),
        ("on-memory-pressure", before.on_memory_pressure, after.on_memory_pressure),
    )
    return [Change(name=name, value=new, when="now") for name, old, new in settings if old != new]


def _told_floor(vm: Vm) -> str:
    return "" if vm.memory_min is None else format_size(vm.memory_min)


async def _apply(context: Context[ConfigureRequest]) -> None:
    vm = context.vm
    spec = _changed(vm.pending or vm.spec, context.request.change)
    phase = observe.phase_of(context.services, vm)
    if phase not in (Phase.RUNNING, Phase.PAUSED):
        context.notes["live"] = {}
        return
    live: dict[str, str] = {}
    async with control(context.services, vm) as monitor:
        if spec.cpu.count != vm.spec.cpu.count:
            live["cpus"] = await _add_cpus(monitor, vm.spec, spec.cpu.count) or await _unused_cpus(context, spec)
        if spec.memory != vm.spec.memory or vm.pending is not None:
            live["memory"] = await _move_balloon(monitor, vm.spec.memory, spec.memory)
        live |= await limits.apply(monitor, vm, spec)
    context.notes["live"] = live


async def _add_cpus(monitor: Monitor, running: VmSpec, count: int) -> str:
    """Plug CPUs in until `count` are there. Returns why it couldn't, or nothing."""
    if running.machine != "q35":
        return f"the machine '{running.machine}' takes no CPUs while it runs"
    if count > running.cpu.maximum:
        return f"it was started for at most {running.cpu.maximum}"
    slots: list[dict[str, Any]] = await monitor.execute("query-hotpluggable-cpus")
    present = [slot for slot in slots if "qom-path" in slot]
    if count < len(present):
        return "a running guest keeps its CPUs"
    free = sorted((slot for slot in slots if "qom-path" not in slot), key=lambda slot: sorted(slot["props"].items()))
    async with monitor.events(["ACPI_DEVICE_OST"]) as answers:
        for slot in free[: count - len(present)]:
            where = "-".join(str(value) for _, value in sorted(slot["props"].items()))
            await monitor.execute("device_add", {"driver": slot["type"], "id": f"cpu-{where}"} | slot["props"])
            with contextlib.suppress(TimedOut):
                await answers.next(timeout=ANSWER_TIME)
    return ""


async def _unused_cpus(context: Context[ConfigureRequest], spec: VmSpec) -> str:
    """Why the guest doesn't use the CPUs that were plugged in; nothing if it does, or nobody can be asked.

    A guest answers the plugging (ACPI _OST) in the same way whether it took the CPU or not; so its agent is asked, and
    puts them to use: not every distribution has a udev rule for that.
    Linux ignores CPUs that are added to what it takes for real hardware, and that is what emulation looks like to it
    (`acpi_is_processor_usable` in arch/x86/kernel/acpi/boot.c, in its stable releases since 2025).
    """
    if not spec.guest.agent:
        return ""
    try:
        count = await guest_setup.use_cpus(context.services.layout.vm(context.subject), timeout=ANSWER_TIME)
    except AtollError:
        return ""
    return "" if count >= spec.cpu.count else "the guest's kernel didn't take them while it runs"


async def _move_balloon(monitor: Monitor, most: int, size: int) -> str:
    if size > most:
        return f"it was started with {format_size(most)}"
    try:
        await monitor.execute("balloon", {"value": size})
    except AtollError as error:
        return f"the guest has no balloon: {error.why}"
    return ""


async def _unapply(context: Context[ConfigureRequest]) -> None:
    vm = context.services.records.vm(context.subject)
    if vm is None or observe.phase_of(context.services, vm) is not Phase.RUNNING:
        return
    async with control(context.services, vm) as monitor:
        with contextlib.suppress(AtollError):
            await monitor.execute("balloon", {"value": (vm.pending or vm.spec).memory})
        with contextlib.suppress(AtollError):
            await limits.apply(monitor, replace(vm, spec=_changed(vm.spec, context.request.change)), vm.spec)


async def _record(context: Context[ConfigureRequest]) -> None:
    before, change, live = context.vm, context.request.change, context.notes["live"]
    vm = _supervised(before, change)
    wanted, labels = _changed(vm.pending or vm.spec, change), _changed_labels(vm.labels, change)
    running = vm.spec if observe.phase_of(context.services, vm) is not Phase.STOPPED else None
    told = [*_told(vm.pending or vm.spec, wanted, running=running, live=live), *_told_labels(vm.labels, labels)]
    context.notes["changes"] = msgspec.to_builtins([*told, *_told_supervision(before, vm)])
    if running is None:
        changed = replace(vm, spec=wanted, pending=None, labels=labels)
    else:
        spec = vm.spec
        if live.get("cpus") == "":
            spec = replace(spec, cpu=replace(spec.cpu, count=wanted.cpu.count))
        spec = replace(spec, guest=wanted.guest, limits=_holding(spec.limits, wanted.limits, live))
        changed = replace(vm, spec=spec, pending=None if wanted == spec else wanted, labels=labels)
    context.services.records.put_vm(changed)
    context.services.records.add_event("vm.changed", vm_id=vm.id, name=vm.name)


def _holding(running: LimitSpec, wanted: LimitSpec, live: dict[str, str]) -> LimitSpec:
    """What holds now; a limit that couldn't be put on is for the next start."""
    return replace(wanted, cpus=running.cpus) if live.get("cpu-limit") else wanted


async def _tell(context: Context[ConfigureRequest]) -> None:
    if context.request.change.labels:
        await networks.tell_names(context.services, networks.shared_by(context.vm.spec, context.vm.pending))


SET = Verb(
    name="set",
    request=ConfigureRequest,
    steps=(
        Step("apply", _apply, _unapply),
        Step("record", _record, final=True),
        Step("tell", _tell),
    ),
)
