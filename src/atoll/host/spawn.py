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
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import EngineFailed, MissingTool, Unsupported
from atoll.host import process, seccomp, syscalls
from atoll.host.jail import BASE, NAMESPACES, Ids, Jail, enter_groups, set_limits, shut_in

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


class Spawned(Struct, frozen=True, kw_only=True):
    pid: int
    """On the host."""
    no_ids: str
    """Why it hasn't the user of its own that the jail asks for; empty when it has, or none is asked for."""


def spawn(program: Program, jail: Jail | None) -> Spawned:
    """Start it. Raises `EngineFailed` when it can't be started or shut in."""
    said, saying = os.pipe()
    waiting, going = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            _stand_alone(program, keep=(saying, waiting))
            if jail is not None:
                jail = _enter_namespaces(jail, saying, waiting)
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


def users_refused(ids: Ids) -> str:
    """Why this user's programs can't have that user; empty when they can. Tried (20 ms)."""
    nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        program = Program(argv=(process.find("true"),), descriptors=(), output=nothing)
        return spawn(program, Jail(namespaces=False, user_namespace=True, ids=ids)).no_ids
    finally:
        os.close(nothing)


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


def _enter_namespaces(jail: Jail, saying: int, waiting: int) -> Jail:
    """Returns what is left to be done: without a user of its own, where the parent couldn't map one."""
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
            answer = os.read(waiting, 1)
            if not answer:
                raise OSError("its users weren't mapped")
            if answer == b"n":
                jail = replace(jail, ids=None)
        else:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {user} 1")
            _write("/proc/self/gid_map", f"0 {group} 1")
    set_limits(jail)
    if jail.namespaces:
        syscalls.unshare(NAMESPACES & ~syscalls.CLONE_NEWNET if jail.host_network else NAMESPACES)
        syscalls.set_host_name("vm")
    return jail


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


def _follow(middle: int, said: int, going: int, jail: Jail | None, *, name: str) -> Spawned:
    """Read what the child says until it has become the program, or has failed."""
    heard, no_ids = b"", ""
    while chunk := os.read(said, 4096):
        heard += chunk
        if chunk == b"map ":
            assert jail is not None
            no_ids = _map_users(middle, jail)
            os.write(going, b"n" if no_ids else b"y")
    words, _, failure = heard.decode(errors="replace").partition("failed ")
    if failure or "pid " not in words:
        raise EngineFailed(f"{name} can't be shut in", failure or "its starter ended", "Run `atoll doctor`.")
    return Spawned(pid=int(words.rpartition("pid ")[2]), no_ids=no_ids)


def _map_users(pid: int, jail: Jail) -> str:
    """In the namespace 0 is this user, who builds the jail, and 1 the program's own. newuidmap takes 2 to 10 ms.

    Where that doesn't work there is no 1, and this says why. Raises `Unsupported` when there has to be.
    """
    assert jail.ids is not None
    if os.geteuid() == 0:
        _write(f"/proc/{pid}/uid_map", f"0 0 1\n1 {jail.ids.user} 1\n")
        _write(f"/proc/{pid}/gid_map", f"0 0 1\n1 {jail.ids.group} 1\n")
        return ""
    refused = _refused_by_tools(pid, jail.ids)
    if refused and jail.ids_required:
        raise Unsupported(
            "the isolation 'strict' isn't possible here",
            f"own user: {refused}",
            "See `atoll doctor`, or use --isolation standard.",
        )
    if refused:
        _write(f"/proc/{pid}/setgroups", "deny")
        for file, ours in (("uid_map", os.getuid()), ("gid_map", os.getgid())):
            # One of the two may have worked, and neither can be written twice.
            if not Path(f"/proc/{pid}/{file}").read_text():
                _write(f"/proc/{pid}/{file}", f"0 {ours} 1")
    return refused


def _refused_by_tools(pid: int, ids: Ids) -> str:
    running: list[subprocess.Popen[str]] = []
    try:
        for tool, us, them in (("newuidmap", os.getuid(), ids.user), ("newgidmap", os.getgid(), ids.group)):
            argv = [process.find(tool), str(pid), "0", str(us), "1", "1", str(them), "1"]
            running.append(subprocess.Popen(argv, stderr=subprocess.PIPE, text=True))
    except (MissingTool, OSError) as error:
        return str(error)
    finally:
        said = [(program.communicate(timeout=10)[1].strip(), program.returncode) for program in running]
    return "; ".join(errors or "newuidmap failed" for errors, code in said if code != 0)
