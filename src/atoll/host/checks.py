"""A check of the doctor, and the checks of what this computer and its kernel have to give."""

from collections.abc import Callable
from typing import Literal

from msgspec import Struct

from atoll.errors import AtollError
from atoll.host import facts, kernel, page_merging
from atoll.layout import Layout
from atoll.model.units import GIB, format_size

WANTED_DISK, WANTED_MEMORY = 5 * GIB, 1 * GIB
WANTED_FILES, WANTED_INOTIFY = 4096, 64


class Check(Struct, frozen=True, kw_only=True):
    """One thing that was looked at. A warning costs a feature or speed; a failure keeps VMs from running."""

    name: str
    ok: Literal["ok", "warning", "failed"]
    found: str
    meaning: str = ""
    """What it means for the user; for what is in order as well, where that isn't plain."""
    remedy: str = ""
    """The command, or the step, that mends it; empty when nothing has to be done."""


def resources(layout: Layout) -> list[Check]:
    memory, limits = facts.memory(), kernel.limits()
    processors = facts.cpu()
    inotify = min(limits.inotify_instances, limits.inotify_watches)
    return [
        Check(name="Processors", ok="ok", found=f"{processors.count} x {processors.model}"),
        _enough("Free memory", memory.available, WANTED_MEMORY, remedy="stop other programs, or other VMs"),
        _free_disk(layout),
        Check(name="Free huge pages", ok="ok", found=format_size(kernel.free_huge_pages())),
        _enough("Open files", limits.open_files, WANTED_FILES, remedy="ulimit -Hn 65536 (as root)", unit=str),
        _enough("inotify", inotify, WANTED_INOTIFY, remedy="sudo sysctl fs.inotify.max_user_instances=512", unit=str),
    ]


def _free_disk(layout: Layout) -> Check:
    remedy = "atoll prune, or set ATOLL_HOME to a folder on a larger disk"
    try:
        return _enough("Free disk", facts.free_disk(layout.data), WANTED_DISK, remedy=remedy)
    except AtollError as error:
        return Check(name="Free disk", ok="failed", found=str(error), remedy=remedy)


def _enough(name: str, there: int, wanted: int, *, remedy: str, unit: Callable[[int], str] = format_size) -> Check:
    if there >= wanted:
        return Check(name=name, ok="ok", found=unit(there))
    meaning = f"a few guests want {unit(wanted)}"
    return Check(name=name, ok="warning", found=unit(there), meaning=meaning, remedy=remedy)


def kernel_features() -> list[Check]:
    namespaces, io_uring, tun = kernel.user_namespaces(), kernel.io_uring(), kernel.tun()
    landlock = kernel.landlock_version()
    setting = namespaces.why.partition(" is ")[0] if " is " in namespaces.why else ""
    value = {"user.max_user_namespaces": 10000, "kernel.unprivileged_userns_clone": 1}.get(setting, 0)
    return [
        Check(name="Kernel", ok="ok", found=kernel.release()),
        _feature(
            "User namespaces",
            namespaces,
            meaning="Debian images can't be built without root, and guests are confined less",
            remedy=f"sudo sysctl {setting}={value}" if setting else "use a kernel that has them",
        ),
        _feature(
            "Landlock",
            kernel.Feature(usable=landlock >= 6, why=kernel.landlock_lacks(landlock)),
            meaning="guests are confined less",
            remedy="add landlock to the kernel's lsm= option, or use Linux 6.12 or newer",
            found=f"version {landlock}",
        ),
        _feature(
            "System call filters",
            kernel.Feature(usable=kernel.seccomp_filters(), why="the kernel hasn't them"),
            meaning="QEMU can't confine itself",
            remedy="use a kernel with CONFIG_SECCOMP_FILTER",
        ),
        _control_groups(),
        _feature(
            "io_uring", io_uring, meaning="disks use threads instead", remedy="sudo sysctl kernel.io_uring_disabled=0"
        ),
        _feature("Network taps", tun, meaning="user-mode networks only", remedy="sudo modprobe tun"),
        Check(
            name="Page merging", ok="ok", found="on" if page_merging.merged().on else "off (it costs processor time)"
        ),
    ]


def _feature(name: str, feature: kernel.Feature, *, meaning: str, remedy: str, found: str = "usable") -> Check:
    if feature.usable:
        return Check(name=name, ok="ok", found=found)
    return Check(name=name, ok="warning", found=feature.why, meaning=meaning, remedy=remedy)


def _control_groups() -> Check:
    groups = kernel.cgroups()
    lacking = {"memory", "pids", "cpu"} - groups.writable
    found = f"version {groups.version}: {' '.join(sorted(groups.writable)) or 'none to write'}"
    if not lacking:
        return Check(name="Control groups", ok="ok", found=found)
    meaning = f"a VM's {', '.join(sorted(lacking))} can't be limited from outside"
    remedy = "systemd-run --user --scope atoll start VM, or run as root" if groups.version else "mount -t cgroup2"
    return Check(name="Control groups", ok="warning", found=found, meaning=meaning, remedy=remedy)
