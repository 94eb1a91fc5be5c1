"""System calls that Python doesn't have, by their numbers. Linux only.

Used between fork and exec, so nothing here imports, logs or takes a lock when it is called.
"""

import ctypes
import os
import platform
from collections.abc import Collection

_X86 = platform.machine() in ("x86_64", "AMD64")
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 8, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 24, 38, 22, 2
_PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_SET_PTRACER = 8, 47, 2, 0x59616D61
_UNSHARE, _PIVOT_ROOT, _CAPSET = (272, 155, 126) if _X86 else (97, 41, 91)
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
LAST_CAPABILITY = 63


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _checked(_syscall(_UNSHARE, ctypes.c_ulong(flags)), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Enter a namespace of this kind."""
    _checked(_libc.setns(descriptor, kind), "setns")


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, data)]
    _checked(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mount {target}")


def unmount(target: str) -> None:
    _checked(_libc.umount2(os.fsencode(target), _MNT_DETACH), f"unmount {target}")


def set_mount_attributes(target: str, attributes: int, *, recursive: bool) -> None:
    """mount_setattr(2), there since Linux 5.12."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), flags, ctypes.byref(wanted), ctypes.c_size_t(32))
    _checked(result, f"mount_setattr {target}")


def set_host_name(name: str) -> None:
    _checked(_libc.sethostname(name.encode(), ctypes.c_size_t(len(name))), "sethostname")


def pivot_root_here() -> None:
    """Make the working folder the root, and let go of the old one (pivot_root(2): `.` twice stacks them)."""
    _checked(_syscall(_PIVOT_ROOT, b".", b"."), "pivot_root")
    unmount(".")


def drop_bounding_set(*, but: Collection[int] = ()) -> None:
    """No program that is executed from here on gets another capability, whatever its file says."""
    for number in range(LAST_CAPABILITY + 1):
        if number in but:
            continue
        if _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
            # The first number that this kernel doesn't know.
            return


def keep_capabilities() -> None:
    """Also when another user is become."""
    _checked(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "keepcaps")


def drop_capabilities(*, but: Collection[int] = ()) -> None:
    """Those that stay are kept by programs that are executed as well."""
    low = sum(1 << number for number in but if number < 32)
    # _LINUX_CAPABILITY_VERSION_3, our own process; effective, permitted and inheritable ones, low halves first.
    sets = (ctypes.c_uint32 * 6)(low, low, low)
    _checked(_syscall(_CAPSET, (ctypes.c_uint32 * 2)(0x20080522, 0), sets), "capset")
    for number in but:
        _checked(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0), "ambient capability")


def let_anyone_trace() -> None:
    """Whom the kernel lets otherwise, also where it lets none but ancestors (Yama's ptrace_scope 1)."""
    _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


def no_new_privileges() -> None:
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def filter_system_calls(program: ctypes.Array[ctypes.c_char]) -> None:
    """Put a classic BPF program in front of every system call of this process, for ever."""
    # struct sock_fprog: the number of 8-byte instructions, and where they are.
    header = (ctypes.c_uint64 * 2)(len(program) // 8, ctypes.addressof(program))
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0), "seccomp")


def landlock_ruleset(files: int, network: int, scopes: int, *, version: int) -> int:
    """A descriptor of a ruleset that forbids these accesses, but for what rules allow (landlock(7))."""
    handled = (ctypes.c_uint64 * 3)(files, network, scopes)
    # The structure grew with the versions; an older kernel refuses a longer one with anything in it.
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    return _checked(_syscall(_LANDLOCK_CREATE, ctypes.byref(handled), ctypes.c_size_t(size), 0), "landlock")


def landlock_allow(ruleset: int, descriptor: int, access: int) -> None:
    """Allow these accesses to a file, or below a folder. The structure is packed: 8 bytes, then 4."""
    rule = ctypes.create_string_buffer(access.to_bytes(8, "little") + descriptor.to_bytes(4, "little"), 12)
    _checked(_syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), "landlock rule")


def landlock_restrict(ruleset: int) -> None:
    _checked(_syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
