"""What a process does between fork and exec to shut itself in. It can only become less from step to step.

    limits ─ namespaces ─ (fork: the first process of its own pid namespace) ─ empty root ─ own user, no privileges
           ─ Landlock ─ filter of system calls ─ exec

This runs in the child of a process that may have threads: it imports nothing and takes no locks.
"""

import ctypes
import os
import resource
from collections.abc import Sequence

from msgspec import Struct

from atoll.host import landlock, syscalls

NAMESPACES = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWCGROUP
)
BASE = "/sys"
"""The folder that the empty root is mounted over: every Linux has it, and nothing that a jail shows is below it."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
USERFAULTFD = "/dev/userfaultfd"
SHARED = "/share"
WORKPLACE = "/run"
"""Where a helper finds the folder that it works in."""


class Ids(Struct, frozen=True, kw_only=True):
    """A user and a group of a VM's own, by the host's numbers."""

    user: int
    group: int


class ServedFolder(Struct, frozen=True, kw_only=True):
    """A folder of the host that is shown to a program that serves it."""

    path: str
    read_only: bool


class Jail(Struct, frozen=True, kw_only=True):
    """How one process is shut in. What the host lacks isn't in here: `sandbox.py` decides that, and tells it."""

    namespaces: bool
    user_namespace: bool = False
    """Made first, by an ordinary user, to be allowed the others. In it 0 is this user, and 1 the program's own."""
    joined: int = 0
    """A process whose user namespace is entered instead; 0 for none."""
    ids: Ids | None = None
    """The user and group to become."""
    ids_required: bool = False
    """It isn't started without them, where an ordinary user's can't be mapped."""
    programs: tuple[str, ...] = ()
    """Folders and files, from /, that are shown: the program and what it is made of."""
    sockets: bool = False
    """It may make sockets and connect them."""
    host_network: bool = False
    """It keeps the network that it is started in."""
    capabilities: tuple[int, ...] = ()
    """What it may do nevertheless (capabilities(7)), by their numbers."""
    folder: str = ""
    """A folder of ours in which it works, and makes sockets but no files; in an empty root it is /run."""
    nests: bool = False
    """It goes on to make a root of its own out of this one, and drops the privileges for that by itself."""
    devices: tuple[str, ...] = DEVICES
    own_devices: tuple[str, ...] = ()
    """Those that it gets made for its user alone, whoever may open the computer's: it takes root, and no container's.
    Where none is made, it sees the computer's if `devices` names it, too."""
    served: ServedFolder | None = None
    """At `SHARED` in the empty root; where there is none, at its own path."""
    texts: tuple[tuple[str, str], ...] = ()
    """Files that are written into the empty root: path and content."""
    landlock: int = 0
    """The version of the interface to use; 0 for none."""
    filtered: bool = False
    """System calls are filtered."""
    limits: tuple[tuple[int, int], ...] = ()
    """Pairs of a resource (RLIMIT_*) and its soft limit."""
    groups: tuple[str, ...] = ()
    """Files that take the pid of a process to be put into a control group."""


def enter_groups(jail: Jail) -> None:
    for path in jail.groups:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.write(descriptor, b"0")
        os.close(descriptor)


def set_limits(jail: Jail) -> None:
    """To be done after a user namespace was made: the limit of processes that we have at that moment counts all that
    this user runs, and a desktop has hundreds of threads.
    """
    for kind, soft in jail.limits:
        hard = resource.getrlimit(kind)[1]
        ceiling = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        # The hard limit stays: the filter keeps the process from raising its own, and we can follow a disk that grows.
        resource.setrlimit(kind, (ceiling, hard))


def shut_in(jail: Jail, shown: Sequence[int], filter_buffer: "ctypes.Array[ctypes.c_char] | None") -> None:
    """The steps after the namespaces were made. `shown` are descriptors whose files can be read by their path."""
    if jail.namespaces:
        _empty_root(jail, shown)
    _become_nobody(jail)
    if jail.nests:
        # Mounts are refused to who is restricted in what files it opens.
        landlock.restrict_scopes(jail.landlock)
    elif jail.landlock:
        programs = ("/",) if jail.namespaces else jail.programs
        devices = (*jail.devices, *jail.own_devices)
        served = [] if jail.served is None else [(_place(jail, jail.served), jail.served.read_only)]
        landlock.restrict(
            jail.landlock,
            programs=programs,
            readable=shown,
            devices=devices,
            served=served,
            sockets_in=("." if jail.folder else None),
            tcp=jail.sockets,
        )
    if filter_buffer is not None:
        syscalls.filter_system_calls(filter_buffer)


def _place(jail: Jail, folder: ServedFolder) -> str:
    return SHARED if jail.namespaces else folder.path


def _empty_root(jail: Jail, shown: Sequence[int]) -> None:
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("none", BASE, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "mode=0755,size=64k,nr_inodes=512")
    for path in jail.programs:
        _show(path)
    # QEMU opens kernels and RAM files by the path of their descriptor; there is no /proc but for these. They are bound
    # by name: the descriptors were opened in another mount namespace, from which nothing can be bound.
    for path in [f"/proc/self/fd/{number}" for number in shown]:
        _make_file(BASE + path)
        source = os.readlink(path)
        # A namespace has no name but this.
        syscalls.mount(source if source.startswith("/") else path, BASE + path, None, syscalls.MS_BIND)
    made = [path for path in jail.own_devices if _make_device(path, BASE + path, owner=jail.ids)]
    bound = [path for path in jail.devices if path not in made]
    for path in bound:
        _make_file(BASE + path)
    for path, text in jail.texts:
        _make_file(BASE + path, text.encode())
    if jail.folder:
        os.makedirs(BASE + WORKPLACE, exist_ok=True)
    if jail.served is not None:
        os.makedirs(BASE + SHARED, exist_ok=True)
    if jail.nests:
        os.makedirs(BASE + "/tmp", exist_ok=True)
    syscalls.set_mount_attributes(BASE, syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID, recursive=True)
    for path in bound:
        syscalls.mount(path, BASE + path, None, syscalls.MS_BIND)
    if jail.folder:
        syscalls.mount(jail.folder, BASE + WORKPLACE, None, syscalls.MS_BIND)
    if jail.served is not None:
        _show_served(jail.served)
    os.chdir(BASE)
    syscalls.pivot_root_here()
    os.chdir(WORKPLACE if jail.folder else "/")


def _show(path: str) -> None:
    target = BASE + path
    # `/lib` is a link to `usr/lib` on most systems, and a folder on others.
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif os.path.exists(path):
        _make_file(target)
    else:
        return
    syscalls.mount(path, target, None, syscalls.MS_BIND | syscalls.MS_REC)


def _show_served(folder: ServedFolder) -> None:
    """With what is mounted below it: in a user namespace a part can't be had without."""
    syscalls.mount(folder.path, BASE + SHARED, None, syscalls.MS_BIND | syscalls.MS_REC)
    attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
    attributes |= syscalls.MOUNT_ATTR_RDONLY if folder.read_only else 0
    syscalls.set_mount_attributes(BASE + SHARED, attributes, recursive=True)


def _make_file(path: str, content: bytes = b"") -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444)
    os.write(descriptor, content)
    os.close(descriptor)


def _make_device(like: str, path: str, *, owner: Ids | None) -> bool:
    status = os.stat(like)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        os.mknod(path, status.st_mode, status.st_rdev)
    except PermissionError:
        return False
    if owner is not None:
        os.chown(path, owner.user, owner.group)
    return True


def _become_nobody(jail: Jail) -> None:
    if os.geteuid() == 0 or jail.user_namespace:
        syscalls.drop_bounding_set(but=jail.capabilities)
    if jail.capabilities:
        syscalls.keep_capabilities()
    if jail.ids is not None:
        # Inside a user namespace they are both called 1.
        user, group = (1, 1) if jail.user_namespace else (jail.ids.user, jail.ids.group)
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    syscalls.no_new_privileges()
    syscalls.drop_capabilities(but=jail.capabilities)
    if jail.folder:
        # We own the folder, and have to reach what another user makes in it.
        os.umask(0)
    if jail.host_network and not jail.namespaces:
        syscalls.let_anyone_trace()
