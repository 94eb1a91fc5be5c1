"""What this kernel lets us do: confinement, limits, devices. Only reads; nothing is tried out."""

import os
import resource
from functools import cache
from pathlib import Path

from msgspec import Struct

from atoll.host.facts import PROC

SYS = Path("/sys")
LANDLOCK_CREATE_RULESET = 444
"""The system call's number, the same on every architecture; its flag 1 asks for the version (landlock(7))."""


class Feature(Struct, frozen=True, kw_only=True):
    """Whether the kernel offers something to this user, and if not, why."""

    usable: bool
    why: str = ""


class Cgroups(Struct, frozen=True, kw_only=True):
    """The control groups that this process may divide further."""

    version: int
    """2, 1 (controllers only in the old hierarchies), or 0 when there are none."""
    controllers: frozenset[str]
    writable: frozenset[str]
    """Those of `controllers` below whose folder of ours this user may make groups."""


class Limits(Struct, frozen=True, kw_only=True):
    """Upper bounds for this process or user; counts."""

    open_files: int
    """What the process may raise its own limit to."""
    inotify_instances: int
    inotify_watches: int


def release() -> str:
    """The kernel's version, `6.12.38+deb13-amd64`."""
    return os.uname().release


def user_namespaces() -> Feature:
    """Whether this user may make user namespaces; the settings are the kernel's, Debian's and Ubuntu's own."""
    if not (PROC / "self/ns/user").exists():
        return Feature(usable=False, why="the kernel was built without them")
    if _number("sys/user/max_user_namespaces", absent=1) == 0:
        return Feature(usable=False, why="user.max_user_namespaces is 0")
    if os.geteuid() == 0:
        return Feature(usable=True)
    if _number("sys/kernel/unprivileged_userns_clone", absent=1) == 0:
        return Feature(usable=False, why="kernel.unprivileged_userns_clone is 0")
    if _number("sys/kernel/apparmor_restrict_unprivileged_userns", absent=0) == 1:
        return Feature(usable=False, why="kernel.apparmor_restrict_unprivileged_userns is 1")
    return Feature(usable=True)


@cache
def landlock_version() -> int:
    """Landlock's ABI version; 0 when the kernel hasn't it or it is switched off."""
    import ctypes

    answer = ctypes.CDLL(None, use_errno=True).syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    return max(0, int(answer))


def landlock_lacks(version: int) -> str:
    """What a process that this version restricts may still do."""
    if version == 0:
        return "the kernel hasn't it, or it is switched off"
    lacking = "TCP, abstract sockets and signals" if version < 4 else "abstract sockets and signals"
    return f"version {version} leaves {lacking} open"


def seccomp_filters() -> bool:
    """Whether system calls can be filtered by a BPF program."""
    return (PROC / "sys/kernel/seccomp/actions_avail").exists()


def io_uring() -> Feature:
    """Whether QEMU may use io_uring (`kernel.io_uring_disabled`, there since Linux 6.6)."""
    disabled = _number("sys/kernel/io_uring_disabled", absent=0)
    if disabled == 0 or (disabled == 1 and os.geteuid() == 0):
        return Feature(usable=True)
    return Feature(usable=False, why=f"kernel.io_uring_disabled is {disabled}")


def tun() -> Feature:
    """Whether network taps can be asked for; making one needs a privilege on top."""
    device = Path("/dev/net/tun")
    if not device.exists():
        return Feature(usable=False, why="there is no /dev/net/tun")
    if not os.access(device, os.R_OK | os.W_OK):
        return Feature(usable=False, why="/dev/net/tun may not be opened by this user")
    return Feature(usable=True)


def free_huge_pages() -> int:
    """Bytes in reserved huge pages that are free, over all sizes."""
    total = 0
    for folder in (SYS / "kernel/mm/hugepages").glob("hugepages-*kB"):
        kib = int(folder.name.removeprefix("hugepages-").removesuffix("kB"))
        total += int(_read(folder / "free_hugepages") or 0) * kib * 1024
    return total


def limits() -> Limits:
    """How many files this process, and how many inotify objects this user, may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return Limits(
        open_files=hard if hard != resource.RLIM_INFINITY else _number("sys/fs/nr_open", absent=1 << 20),
        inotify_instances=_number("sys/fs/inotify/max_user_instances", absent=0),
        inotify_watches=_number("sys/fs/inotify/max_user_watches", absent=0),
    )


def cgroups() -> Cgroups:
    """The control groups of this process (cgroups(7)): the second version where it has controllers, else the first."""
    mounts = cgroup_mounts()
    ours = own_groups()
    if "" in mounts and "" in ours:
        divisible = divisible_group()
        folder = divisible or mounts[""] / ours[""].lstrip("/")
        controllers = frozenset((_read(folder / "cgroup.controllers") or "").split())
        if "memory" in controllers or len(mounts) == 1:
            writable = controllers if divisible else frozenset[str]()
            return Cgroups(version=2, controllers=controllers, writable=writable)
    old = {name: mounts[name] / ours[name].lstrip("/") for name in mounts if name and name in ours}
    return Cgroups(
        version=1 if old else 0,
        controllers=frozenset(old),
        writable=frozenset(name for name, folder in old.items() if os.access(folder, os.W_OK)),
    )


def divisible_group() -> Path | None:
    """The highest group of the second version, of ours and those above, in which this user may make groups and put our
    processes into them.

    It has no processes itself, but for the very root, which has no type: the kernel gives groups with processes no
    controllers for others (cgroup_vet_subtree_control_enable()). An ordinary user's is the one that systemd lets his
    own manager have, when we were started by that: from a desktop, or by `systemd-run --user --scope`.
    """
    return next((folder for folder in groups_above() if _is_divisible(folder)), None)


def _is_divisible(folder: Path) -> bool:
    files = ("", "cgroup.procs", "cgroup.subtree_control")
    if not all(os.access(folder / name, os.W_OK) for name in files):
        return False
    return not (folder / "cgroup.type").exists() or not _read(folder / "cgroup.procs")


def groups_above() -> list[Path]:
    """Our group of the second version and those that it is in, from the highest on; none where it isn't mounted."""
    mount, group = cgroup_mounts().get(""), own_groups().get("")
    if mount is None or group is None:
        return []
    own = mount / group.lstrip("/")
    return [folder for folder in (*reversed(own.parents), own) if folder.is_relative_to(mount)]


def cgroup_mounts() -> dict[str, Path]:
    """Where each controller of the first version is mounted; the second version is ''."""
    found = {}
    for line in (PROC / "self/mounts").read_text(errors="replace").splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found[""] = Path(folder)
        elif kind == "cgroup":
            # Read-write, no access times and the like stand among the controllers: `own_groups` names those.
            found |= {option: Path(folder) for option in options.split(",")}
    return found


def own_groups() -> dict[str, str]:
    """The group of this process for each controller of the first version; '' for the second."""
    groups: dict[str, str] = {}
    for line in (PROC / "self/cgroup").read_text(errors="replace").splitlines():
        _, controllers, group = line.split(":", 2)
        groups |= {name: group for name in controllers.split(",") if not name.startswith("name=")}
    return groups


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(name: str, *, absent: int) -> int:
    text = _read(PROC / name)
    return absent if text is None else int(text)
