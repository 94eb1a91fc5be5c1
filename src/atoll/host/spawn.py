"""Starts a program detached and shut in: it outlives us, and what it may do is decided before its first instruction.

    parent ─ fork ─ middle: session, control group, limits, user namespace (the parent maps its users), namespaces
                      └─ fork ─ child, pid 1 in there: empty root, own user, Landlock, filter ─ exec

Middle and child tell the parent on a pipe how far they came; it closes by itself when the child has become the program.
"""

import ctypes
import os
import resource
import signal
import subprocess
from functools import cache

from msgspec import Struct

from atoll.errors import EngineFailed
from atoll.host import process, seccomp, syscalls
from atoll.host.jail import BASE, NAMESPACES, Jail, enter_groups, set_limits, shut_in

MANY_DESCRIPTORS = 1024
"""More than QEMU has open."""


class Program(Struct, frozen=True, kw_only=True):
    """What is started."""

    argv: tuple[str, ...]
    descriptors: tuple[int, ...]
    """Those it gets, under the same numbers."""
    shown: tuple[int, ...] = ()
    """Those of `descriptors` that it opens again by the path /proc/self/fd/N."""
    input: int | None = None
    """Where its standard input comes from; from nowhere otherwise."""
    output: int
    """Where its standard output and error go."""
    errors: int | None = None
    """Where its standard error goes instead."""
    folder: str = "/"
    """Where it works, if it has no other root. Its environment has nothing but this."""


def spawn(program: Program, jail: Jail | None) -> int:
    """Start it; returns its pid on the host. Raises `EngineFailed` when it can't be started or shut in."""
    said, saying = os.pipe()
    waiting, going = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            _stand_alone(program, keep=(saying, waiting))
            if jail is not None:
                _enter_namespaces(jail, saying, waiting)
            _leave_parent(saying)
            os.chdir(program.folder)
            _widen_table_of_descriptors()
            if jail is not None:
                shut_in(jail, program.shown, _filter(jail))
            # Whatever secrets are in our environment, they aren't for it.
            os.execve(program.argv[0], program.argv, {"ATOLL_FOLDER": program.folder, "LC_ALL": "C.UTF-8"})
        except BaseException as error:
            os.write(saying, f"failed {error}".encode(errors="replace")[:2000])
        os._exit(127)
    os.close(saying)
    os.close(waiting)
    try:
        return _follow(middle, said, going, jail, name=os.path.basename(program.argv[0]))  # noqa: PTH119
    finally:
        os.close(said)
        os.close(going)
        os.waitpid(middle, 0)


@cache
def namespaces_refused() -> str:
    """Why this process can't make the namespaces of a jail; empty when it can. Tried, in a child (2 ms).

    Settings tell only a part of it: containers filter the system call, and Ubuntu lets namespaces be made in which
    nothing may be mounted.
    """
    said, saying = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(NAMESPACES | (syscalls.CLONE_NEWUSER if os.geteuid() else 0))
            syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
            syscalls.mount("none", BASE, "tmpfs")
        except BaseException as error:
            os.write(saying, str(error).encode()[:500] or b"it failed")
        os._exit(0)
    os.close(saying)
    why = os.read(said, 500).decode(errors="replace")
    os.close(said)
    os.waitpid(child, 0)
    return why


def _stand_alone(program: Program, *, keep: tuple[int, ...]) -> None:
    """A session of its own, and no descriptor but those that were given."""
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDWR)
    errors = program.output if program.errors is None else program.errors
    source_of_input = nothing if program.input is None else program.input
    for target, source in ((0, source_of_input), (1, program.output), (2, errors)):
        os.dup2(source, target)
    wanted = {0, 1, 2, *keep, *program.descriptors}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) not in wanted:
            try:
                os.close(int(name))
            except OSError:
                # The one that listed them.
                continue
    for number in program.descriptors:
        os.set_inheritable(number, True)
    # Python ignores broken pipes. It ignores files that reach their limit as well, which stays: the write fails then.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _enter_namespaces(jail: Jail, saying: int, waiting: int) -> None:
    enter_groups(jail)
    if jail.joined:
        descriptor = os.open(f"/proc/{jail.joined}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        syscalls.setns(descriptor, syscalls.CLONE_NEWUSER)
        os.close(descriptor)
    elif jail.user_namespace:
        user, group = os.getuid(), os.getgid()
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        if jail.ids is not None:
            # Only newuidmap may map other users; the parent runs it.
            os.write(saying, b"map ")
            if not os.read(waiting, 1):
                raise OSError("its users weren't mapped")
        else:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {user} 1")
            _write("/proc/self/gid_map", f"0 {group} 1")
    set_limits(jail)
    if jail.namespaces:
        syscalls.unshare(NAMESPACES & ~syscalls.CLONE_NEWNET if jail.host_network else NAMESPACES)
        syscalls.set_host_name("vm")


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def _leave_parent(saying: int) -> None:
    """The child goes on as nobody's child: the first process of the pid namespace, if there is one."""
    child = os.fork()
    if child:
        os.write(saying, f"pid {child} ".encode())
        os._exit(0)


def _widen_table_of_descriptors() -> None:
    """One that grows while there are threads makes the kernel wait for all processors, 10 to 20 ms each time
    (expand_fdtable() in its fs/file.c). QEMU's outgrows 64 when its guest goes on; exec keeps the size.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(os.dup2(0, min(allowed, MANY_DESCRIPTORS) - 1))


def _filter(jail: Jail) -> "ctypes.Array[ctypes.c_char] | None":
    if not jail.filtered:
        return None
    own = seccomp.filter_program(
        own_pid=os.getpid(), sockets=jail.sockets, nests=jail.nests, serves_files=jail.served is not None
    )
    return ctypes.create_string_buffer(own, len(own))


def _follow(middle: int, said: int, going: int, jail: Jail | None, *, name: str) -> int:
    """Read what the child says until it has become the program, or has failed."""
    heard = b""
    while chunk := os.read(said, 4096):
        heard += chunk
        if chunk == b"map ":
            assert jail is not None
            _map_users(middle, jail)
            os.write(going, b"g")
    words, _, failure = heard.decode(errors="replace").partition("failed ")
    if failure or "pid " not in words:
        raise EngineFailed(f"{name} can't be shut in", failure or "its starter ended", "Run `atoll doctor`.")
    return int(words.rpartition("pid ")[2])


def _map_users(pid: int, jail: Jail) -> None:
    """In the namespace 0 is this user, who builds the jail, and 1 the program's own. newuidmap takes 2 to 10 ms."""
    assert jail.ids is not None
    if os.geteuid() == 0:
        _write(f"/proc/{pid}/uid_map", f"0 0 1\n1 {jail.ids.user} 1\n")
        _write(f"/proc/{pid}/gid_map", f"0 0 1\n1 {jail.ids.group} 1\n")
        return
    running: list[subprocess.Popen[str]] = []
    for tool, us, them in (("newuidmap", os.getuid(), jail.ids.user), ("newgidmap", os.getgid(), jail.ids.group)):
        argv = [process.find(tool), str(pid), "0", str(us), "1", "1", str(them), "1"]
        running.append(subprocess.Popen(argv, stderr=subprocess.PIPE, text=True))
    for program in running:
        _, errors = program.communicate(timeout=10)
        if program.returncode != 0:
            raise EngineFailed("a user of its own can't be mapped", errors.strip(), "See `man newuidmap`.")
