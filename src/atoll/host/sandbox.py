"""Which barriers this computer has for a program that may turn hostile. `spawn.py` starts it behind them.

No barrier needs a daemon. What is missing is told, and `strict` refuses to start without it.
"""

import os
import platform
import pwd
import resource
import sysconfig
from functools import cache
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import MissingTool, Unsupported
from atoll.host import cgroups, kernel, process, seccomp
from atoll.host.jail import DEVICES, USERFAULTFD, Ids, Jail
from atoll.host.spawn import namespaces_refused
from atoll.model.isolation import BARRIERS, Barrier, Isolation, IsolationLevel
from atoll.model.units import GIB, MIB

FIRST_USER = 0x70000000
"""Root's VMs run as users from here on, 2^27 of them: a range that neither systemd nor useradd gives to anyone
(systemd's UIDs-GIDs page)."""
CPU_LIMIT = "CPU limit"
"""A barrier when a limit was set."""
UNTOUCHED = 512 * MIB
"""Stacks of threads and coroutines count as data, though hardly a page of them is ever touched."""
STACK = 2 * MIB
"""Room for each thread's stack. QEMU's heavy stacks are its coroutines', which it makes itself."""


def largest_file(size: int) -> int:
    """What a file may come to that holds `size` bytes of a guest: tables, and a spare gibibyte."""
    return int(size * 1.1) + GIB


async def allow_file(vm_id: str, pid: int, size: int) -> None:
    """Let a QEMU that was started for smaller disks write a file for `size` bytes of its guest."""
    wanted = largest_file(size)
    try:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (wanted, hard))
    except ProcessLookupError:
        return
    except PermissionError:
        # A root that may not change others' limits (containers' lacks CAP_SYS_RESOURCE) may still become their user.
        ids = own_ids(vm_id)
        if ids is None:
            raise
        become = ["setpriv", f"--reuid={ids.user}", f"--regid={ids.group}", "--clear-groups"]
        await process.run([*become, "prlimit", f"--pid={pid}", f"--fsize={wanted}:"])


class Wanted(Struct, frozen=True, kw_only=True):
    """What is to be shut in."""

    id: str
    """The VM's: decides the user, and names its control group."""
    level: IsolationLevel
    memory: int
    """Bytes that it may take, the guest's RAM included."""
    threads: int
    cpus: float
    """How many processors' time it may take."""
    cpus_limited: bool = False
    """That was asked for, so it is told whether it holds."""
    guest_data: int
    """Bytes of the guest that its largest file is for: a disk's size, or the RAM's."""


def prepare(binary: str, wanted: Wanted) -> tuple[Jail | None, Isolation]:
    """The jail for this program on this computer, and which barriers hold in it.

    Raises `Unsupported` where the level is `strict` and a barrier is missing.
    """
    if wanted.level == "none":
        missing = tuple(Barrier(name=name, holds=False, why="isolation is switched off") for name in BARRIERS)
        if wanted.cpus_limited:
            missing = (*missing, Barrier(name=CPU_LIMIT, holds=False, why="isolation is switched off"))
        return None, Isolation(level="none", barriers=missing)
    root, landlock = os.geteuid() == 0, kernel.landlock_version()
    namespaces = usable_namespaces()
    no_ids = without_ids(wanted.id) if root or namespaces.usable else namespaces.why
    ids = None if no_ids else own_ids(wanted.id)
    groups = cgroups.make(wanted.id, cgroups.Wanted(processes=wanted.threads, cpus=wanted.cpus))
    jail = Jail(
        namespaces=namespaces.usable,
        user_namespace=namespaces.usable and not root,
        ids=ids,
        ids_required=wanted.level == "strict",
        programs=shown_programs(binary),
        devices=DEVICES,
        # For snapshots that are written while the guest runs; without it, it stands still meanwhile.
        own_devices=(USERFAULTFD,) if root and namespaces.usable and Path(USERFAULTFD).exists() else (),
        landlock=landlock,
        filtered=kernel.seccomp_filters() and seccomp.known(),
        limits=_limits(wanted, alone=ids is not None or (namespaces.usable and not root)),
        groups=groups.entrances,
    )
    barriers = _barriers(jail, namespaces=namespaces, no_ids=no_ids, groups=groups)
    if wanted.cpus_limited:
        barriers = (*barriers, _cpu_limit(wanted.cpus, groups))
    isolation = Isolation(level=wanted.level, user=ids.user if ids else None, barriers=barriers)
    if wanted.level == "strict" and isolation.missing:
        cgroups.remove(wanted.id)
        lacking = "; ".join(f"{barrier.name}: {barrier.why}" for barrier in isolation.missing)
        raise Unsupported(
            "the isolation 'strict' isn't possible here", lacking, "See `atoll doctor`, or use --isolation standard."
        )
    return jail, isolation


def usable_namespaces() -> kernel.Feature:
    """By the settings first, whose words help more than the kernel's; then by a trial."""
    told = kernel.user_namespaces()
    if not told.usable and os.geteuid() != 0:
        return told
    refused = namespaces_refused()
    return kernel.Feature(usable=not refused, why=refused)


def _limits(wanted: Wanted, *, alone: bool) -> tuple[tuple[int, int], ...]:
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, largest_file(wanted.guest_data)),
        (resource.RLIMIT_STACK, STACK),
    ]
    # QEMU raises this one to the most it may have, and gives up where it can't: the filter would keep it from that.
    limits.append((resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if alone:
        # Counted for each user; in a user namespace for the user in there.
        limits.append((resource.RLIMIT_NPROC, wanted.threads))
    # Private writable memory, which the guest's RAM is as well. The filter forbids shared memory without a file.
    limits.append((resource.RLIMIT_DATA, wanted.memory + UNTOUCHED))
    return tuple(limits)


def _barriers(jail: Jail, *, namespaces: kernel.Feature, no_ids: str, groups: cgroups.Groups) -> tuple[Barrier, ...]:
    def barrier(name: str, holds: bool, rests_on: str, missing: str) -> Barrier:
        return Barrier(name=name, holds=holds, why=rests_on if holds else missing)

    own = jail.ids is not None
    counted = "pids" in groups.bounded
    numbered = any(kind == resource.RLIMIT_NPROC for kind, _ in jail.limits)
    first_version = f"control group, version {groups.version}"
    return (
        barrier("namespaces", jail.namespaces, "mount, pid, ipc, uts, net, cgroup", namespaces.why),
        barrier("empty root", jail.namespaces, "pivot_root", namespaces.why),
        barrier("own user", own, f"user {jail.ids.user}" if jail.ids else "", no_ids),
        barrier("no privileges", True, "no_new_privs", ""),
        barrier("system calls", jail.filtered, "seccomp, and QEMU's own", "no filter on this kernel or processor"),
        barrier("landlock", jail.landlock >= 6, f"version {jail.landlock}", kernel.landlock_lacks(jail.landlock)),
        barrier("memory limit", jail.filtered, "RLIMIT_DATA", "it can be raised where no system calls are filtered"),
        barrier(
            "process limit",
            counted or numbered,
            first_version if counted else "RLIMIT_NPROC",
            "it would count all of this user's processes",
        ),
        barrier("file limit", jail.filtered, "RLIMIT_FSIZE", "it can be raised where no system calls are filtered"),
    )


def _cpu_limit(cpus: float, groups: cgroups.Groups) -> Barrier:
    if "cpu" in groups.bounded:
        return Barrier(name=CPU_LIMIT, holds=True, why=f"{cpus:g} processors' time, control group")
    return Barrier(name=CPU_LIMIT, holds=False, why=groups.why or cgroups.NO_GROUP)


@cache
def shown_libraries() -> tuple[str, ...]:
    """What programs are linked with, and how they find it."""
    triplet = f"/usr/lib/{platform.machine()}-linux-gnu"
    libraries = triplet if Path(triplet).is_dir() else "/usr/lib"
    shown = ("/lib", "/lib64", "/usr/lib64", libraries, "/etc/ld.so.cache")
    return tuple(path for path in shown if os.path.lexists(path))


@cache
def shown_programs(binary: str) -> tuple[str, ...]:
    """What QEMU is made of: its file, its libraries and modules, and its firmware blobs; all below /usr as a rule."""
    real = os.path.realpath(binary)
    shown = [*shown_libraries(), "/usr/share/qemu", "/usr/share/seabios", "/usr/share/ipxe", "/usr/lib/ipxe"]
    shown += ["/usr/share/seavgabios", "/usr/share/ipxe.qemu"]
    shown += _beside(real)
    shown += _linked_from(Path("/usr/share/qemu"), shown)
    shown = [path for path in shown if os.path.lexists(path)]
    # A link's target is shown where the link is, unless it is below what is shown already.
    return tuple(dict.fromkeys([*shown, binary, real]))


@cache
def shown_python(real: str) -> tuple[str, ...]:
    """What this Python is made of, whose file that is."""
    return (*_beside(real), sysconfig.get_path("stdlib"))


def _beside(real: str) -> list[str]:
    """For a program that was built or installed elsewhere: what is beside it (/opt/qemu, /usr/local, /nix/store)."""
    if real.startswith("/usr/bin/"):
        return []
    return ["/nix/store" if real.startswith("/nix/store/") else str(Path(real).parent.parent)]


def _linked_from(folder: Path, shown: list[str]) -> list[str]:
    """The folders that links in a folder lead to, if they aren't shown: firmware of other architectures, as a rule."""
    links = [entry.resolve() for entry in folder.iterdir() if entry.is_symlink()] if folder.is_dir() else []
    return sorted({str(real.parent) for real in links if not str(real).startswith(tuple(f"{each}/" for each in shown))})


def without_user(isolation: Isolation, why: str) -> Isolation:
    """What holds where a user of its own was meant to and couldn't be had."""
    barriers = tuple(
        Barrier(name=each.name, holds=False, why=why) if each.name == "own user" else each
        for each in isolation.barriers
    )
    return replace(isolation, user=None, barriers=barriers)


def own_ids(vm_id: str) -> Ids | None:
    """Root's VMs have theirs from a range that nobody uses, an ordinary user's from the subordinate ids.

    They follow from the VM's id. Two VMs of an ordinary user may share them now and then: there are 65,536.
    """
    chosen = int(vm_id[:8], 16)
    if os.geteuid() == 0:
        number = FIRST_USER + chosen % (1 << 27)
        return Ids(user=number, group=number)
    users, groups = _sub_ids("/etc/subuid"), _sub_ids("/etc/subgid")
    if users is None or groups is None:
        return None
    return Ids(user=users[0] + chosen % users[1], group=groups[0] + chosen % groups[1])


def without_ids(vm_id: str) -> str:
    """What keeps this VM from having a user of its own; empty when nothing does."""
    ids = own_ids(vm_id)
    if os.geteuid() == 0:
        return "" if ids is not None and _is_mapped(ids.user) else "in this container there is no such user"
    if ids is None:
        return f"{_user_name()} has no subordinate ids in /etc/subuid and /etc/subgid"
    try:
        for tool in ("newuidmap", "newgidmap"):
            process.find(tool)
    except MissingTool as error:
        return f"{error.what} ({error.next_step})"
    return ""


def _is_mapped(user: int) -> bool:
    """Whether our own user namespace has that user (user_namespaces(7)): a container's root has but some."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= user < first + count:
            return True
    return False


@cache
def _sub_ids(file: str) -> tuple[int, int] | None:
    """First and count of this user's subordinate ids (subuid(5): name or number, first, count)."""
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, numbers = line.partition(":")
        first, _, count = numbers.partition(":")
        if name in (_user_name(), str(os.getuid())) and first.isdecimal() and count.isdecimal() and int(count):
            return int(first), int(count)
    return None


@cache
def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
