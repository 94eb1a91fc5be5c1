"""`ls` and `show`. `ls` runs no event loop and imports as little as it can: it is what is typed most."""

from typing import TYPE_CHECKING

import click

from atoll.cli.failures import Format, note, settings
from atoll.cli.options import VM, parse_pairs
from atoll.cli.output import age, emit, format_option, moment, print_description, print_table
from atoll.model.state import Phase
from atoll.model.units import format_rate, format_size
from atoll.model.vm import VmInfo

if TYPE_CHECKING:
    from atoll.model.spec import LimitSpec, NicSpec, VmSpec
    from atoll.model.vm import ShareInfo, Vm
    from atoll.platform.api import AsyncHost


@click.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Only names, one a line.")
@click.option("--state", type=click.Choice([str(phase) for phase in Phase]), help="Only those in this state.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only those with this label.")
@format_option
def ls_command(quiet: bool, state: str | None, labels: tuple[str, ...], format: Format) -> None:
    """List VMs with their state, the oldest first.

    \b
    Examples:
      atoll ls
      atoll ls --state running --format json
      atoll rm --force $(atoll ls --quiet --label tier=test)
    """
    wanted = parse_pairs(labels, option="--label").items()
    vms = _all_vms()
    vms = [each for each in vms if state in (None, each.phase) and wanted <= each.vm.labels.items()]
    if quiet:
        for each in vms:
            click.echo(each.vm.name)
    elif format != "table":
        emit(vms, format)
    else:
        print_table(("NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "PORTS", "CREATED"), [_row(each) for each in vms])


def _all_vms() -> list[VmInfo]:
    if settings().host is not None:
        from atoll.cli.session import perform

        return perform(lambda host: host.ls(), cancelled="")
    from atoll.platform.local import list_now

    vms, notices = list_now()
    for told in notices:
        note(told)
    return vms


def _row(info: VmInfo) -> tuple[str, ...]:
    vm = info.vm
    return (
        vm.name,
        _state(info),
        vm.image or "-",
        str(vm.spec.cpu.count),
        format_size(vm.spec.memory),
        ", ".join(_ports(vm.spec)) or "-",
        age(vm.created_at),
    )


def _state(info: VmInfo) -> str:
    """The phase, with what is being done to it, or why it is in it if not on demand."""
    if info.vm.pool is not None:
        return f"{info.phase} (in a pool)"
    if info.operation or info.trouble:
        return f"{info.phase} ({info.operation or info.trouble})"
    if info.vm.sleeps:
        return f"{info.phase} ({info.vm.suspended_because})"
    if info.exit and info.exit.reason not in ("stopped", "guest-shutdown"):
        return f"{info.phase} ({info.exit.reason})"
    return str(info.phase)


def _ports(spec: "VmSpec") -> list[str]:
    found = []
    for nic in spec.nics:
        for port in nic.ports:
            address = "" if port.host_address == "127.0.0.1" else f"{port.host_address}:"
            suffix = "" if port.protocol == "tcp" else f"/{port.protocol}"
            found.append(f"{address}{port.host_port}->{port.guest_port}{suffix}")
    return found


@click.command("show")
@click.argument("vm", type=VM)
@format_option
def show_command(vm: str, format: Format) -> None:
    """Tell all about a VM: its hardware, its state, the snapshot it stands on, how its last run ended.

    \b
    Examples:
      atoll show web
      atoll show web --format json
    """
    from atoll.cli.session import perform

    async def action(host: "AsyncHost") -> tuple[VmInfo, dict[str, str]]:
        info = await (await host.get(vm)).info()
        shared = any(nic.network for nic in info.vm.spec.nics)
        networks = await host.networks.ls() if shared else []
        return info, {each.network.id: each.network.name for each in networks}

    info, networks = perform(action, cancelled="")
    if format != "table":
        emit(info, format)
        return
    print_description([pair for pair in _description(info, networks) if pair[1]])


def _description(info: VmInfo, networks: dict[str, str]) -> list[tuple[str, str]]:
    from atoll.model.idle import shown

    vm, spec = info.vm, info.vm.spec
    disks = "\n".join(
        f"{disk.name} {format_size(disk.size)} {disk.bus}{' CD' if disk.media == 'cdrom' else ''}"
        for disk in spec.disks
    )
    return [
        ("Name", vm.name),
        ("Id", vm.id),
        ("State", _state(info)),
        ("To go on", _way_on(info)),
        ("Last end", _last_end(info)),
        ("Last lines", info.vm.last_exit.last_lines if info.vm.last_exit else ""),
        ("Image", vm.image),
        ("Snapshot", info.stands_on or ("one that is forgotten" if vm.snapshot else "none")),
        ("Suspended", _suspended(info)),
        ("Created", f"{moment(vm.created_at)} ({age(vm.created_at)})"),
        ("Process", _process(info)),
        ("Isolation", _isolation(info)),
        ("Machine", f"{spec.machine_type or spec.machine}, {spec.arch}, {spec.boot.firmware}"),
        ("CPUs", f"{spec.cpu.count} (up to {spec.cpu.maximum}), {spec.cpu.model}"),
        ("Memory", format_size(spec.memory)),
        ("Disks", disks),
        ("Limits", _limits(spec.limits)),
        ("Network", "\n".join(_nic(nic, networks) for nic in spec.nics)),
        ("Shares", "\n".join(_share(share) for share in info.shares)),
        ("Ports", "\n".join(_ports(spec))),
        ("Display", spec.display),
        ("Guest agent", "yes" if spec.guest.agent else "no"),
        ("Labels", "\n".join(f"{key}={value}" for key, value in vm.labels.items())),
        ("At next start", "changed settings take effect" if vm.pending else ""),
        ("When stopped", "it is removed" if vm.remove_when_stopped else ""),
        ("Restart", "" if vm.restart == "never" else vm.restart),
        ("At boot", "it is started" if vm.autostart else ""),
        ("Boot order", str(vm.boot_order) if vm.boot_order else ""),
        ("When idle", "" if vm.suspend_when_idle is None else f"suspended after {shown(vm.suspend_when_idle)}"),
        ("Memory is short", _under_pressure(vm)),
    ]


def _under_pressure(vm: "Vm") -> str:
    from atoll.model.pressure import floor_of

    if vm.on_memory_pressure == "nothing":
        return "nothing is done to it"
    floor = format_size(floor_of(vm.spec.memory, vm.memory_min))
    return f"it is left at least {floor}" + (", or suspended" if vm.on_memory_pressure == "suspend" else "")


def _limits(limits: "LimitSpec") -> str:
    told = [
        f"{limits.cpus:g} processors' time" if limits.cpus else "",
        f"{format_size(limits.io_bytes)}/s for its disks" if limits.io_bytes else "",
        f"{limits.io_operations} disk operations a second" if limits.io_operations else "",
    ]
    return ", ".join(each for each in told if each)


def _isolation(info: VmInfo) -> str:
    """The level, and of a running one each barrier: what it rests on, or why it doesn't hold."""
    run = info.vm.run
    if run is None or run.isolation is None:
        return info.vm.spec.isolation
    lines = [f"{barrier.name}: {'' if barrier.holds else 'no: '}{barrier.why}" for barrier in run.isolation.barriers]
    return "\n".join([run.isolation.level, *lines])


def _nic(nic: "NicSpec", networks: dict[str, str]) -> str:
    where = "" if nic.network is None else ", leads nowhere"
    if nic.network:
        where = f" on {networks.get(nic.network, 'a network that is gone')}{f', {nic.address}' if nic.address else ''}"
        where += f", groups {'+'.join(nic.groups)}" if nic.groups else ""
        where += f", limit {format_rate(nic.limit)}" if nic.limit else ""
    return f"{nic.name} {nic.mac} {nic.model}{where}"


def _share(share: "ShareInfo") -> str:
    access = " (read-only)" if share.read_only else ""
    state = f": {share.state}" if share.state != "shared" else ""
    return f"{share.host_path} at {share.guest_path}{access}{state}"


def _way_on(info: VmInfo) -> str:
    if info.trouble != "disk-full":
        return ""
    return f"free some space on this computer's disk, then `atoll resume {info.vm.name}`; what it writes is kept"


def _suspended(info: VmInfo) -> str:
    memory = info.vm.suspended
    if memory is None:
        return "no"
    why = {"idle": " since nobody used it", "memory": " since the computer's memory ran out"}
    because = why.get(info.vm.suspended_because, "")
    size = f"{format_size(memory.file_size)} of memory"
    if info.vm.sleeps:
        return f"yes{because}, {size}; any command that needs it wakes it, and callers of its ports do"
    return f"yes, {size}; `atoll resume {info.vm.name}` goes on from there"


def _last_end(info: VmInfo) -> str:
    ended = info.vm.last_exit
    if ended is None:
        return ""
    return f"{ended.reason}, {moment(ended.at)}" + (f": {ended.detail}" if ended.detail else "")


def _process(info: VmInfo) -> str:
    run = info.vm.run
    if run is None:
        return ""
    return f"{run.pid}, QEMU {run.qemu_version}, {run.accelerator}, since {moment(run.started_at)}"
