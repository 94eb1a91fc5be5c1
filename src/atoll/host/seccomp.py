"""A filter of system calls, as a classic BPF program. Pure.

QEMU's own `-sandbox` is a list of denials that leaves sockets, signals, tracing and much of the kernel's young code
open (system/qemu-seccomp.c in its source). This one denies those from outside; both hold at the same time.
"""

import platform
import struct
from collections.abc import Callable

ALLOW, DENY_EPERM, DENY_ENOSYS, KILL = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000
ANSWER_0 = 0x00050000
"""The call isn't made, and its result is 0."""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_AND = 0x54
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
"""Where the fields are in `struct seccomp_data`; an argument has 8 bytes, its low half first."""
NEW_NAMESPACES = 0x7E020080
"""All CLONE_NEW* flags, CLONE_NEWTIME included."""
_TERMINAL_INPUT, _TERMINAL_PASTE = 0x5412, 0x541C

# Numbers on x86-64, and on the architectures that share the generic table (arm64, riscv64); None where there is none.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "acct": (163, 89),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setfsuid": (122, 151), "setfsgid": (123, 152),
    "setgroups": (116, 159), "capset": (126, 91), "setrlimit": (160, 164),
    "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "vhangup": (153, 58),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "mknodat": (259, 33), "mknod": (133, None),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None),
    "memfd_secret": (447, 447), "shmget": (29, 194),
    "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
_NETWORKING = ("socket", "connect", "bind")
_NESTING = ("setns", "unshare", "mount", "umount2", "pivot_root", "capset")
_GETEUID = (107, 175)
_FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK."""
_SOCKET, _NETLINK_NETFILTER = (41, 198), 12
_CLONE, _CLONE3, _TGKILL, _PRLIMIT, _IOCTL = (56, 220), (435, 435), (234, 131), (302, 261), (16, 29)
_MMAP, _SHARED_ANONYMOUS = (9, 222), 0x21
_FORKING = ((56, 220), (57, None), (58, None))
"""clone, fork, vfork."""
_MODES = (((90, None), 1), ((91, 52), 1), ((268, 53), 2), ((452, 452), 2), ((257, 56), 3), ((2, None), 2),
          ((85, None), 1), ((83, None), 1), ((258, 34), 2))  # fmt: skip
"""chmod, fchmod, fchmodat, fchmodat2, openat, open, creat, mkdir, mkdirat; and which argument is the mode."""
_OPENAT2, _SET_ID_BITS = (437, 437), 0o6000
_ARCHITECTURES = {
    "x86_64": (0xC000003E, 0),
    "amd64": (0xC000003E, 0),
    "aarch64": (0xC00000B7, 1),
    "arm64": (0xC00000B7, 1),
    "riscv64": (0xC00000F3, 1),
}
"""The kernel's number of each (AUDIT_ARCH_*), and its column in the tables above."""


def known(machine: str | None = None) -> bool:
    """Whether there is a filter for this kind of computer."""
    return (machine or platform.machine()).lower() in _ARCHITECTURES


def filter_program(
    *,
    own_pid: int,
    sockets: bool = False,
    nests: bool = False,
    serves_files: bool = False,
    machine: str | None = None,
) -> bytes:
    """The program for a process that has `own_pid` in its own pid namespace: it may signal its own threads.

    With `sockets` it may make sockets of the families that a network's helpers need, and connect them. One that `nests`
    may make a root of its own as it starts; it is told that its user is 0, without which slirp4netns doesn't try. One
    that `serves_files` has no threads, and gives no file the right to run as its owner or group.
    """
    audit, column = _ARCHITECTURES[(machine or platform.machine()).lower()]
    code = _Program()
    code.load(_ARCH)
    code.unless(_EQUAL, audit, KILL)
    code.load(_NUMBER)
    if column == 0:
        # The x32 table has the same calls under other numbers.
        code.when(_AT_LEAST, 0x40000000, DENY_EPERM)
    needed = (_NETWORKING if sockets else ()) + (_NESTING if nests else ())
    for name, numbers in _DENIED.items():
        if numbers[column] is not None and name not in needed:
            code.when(_EQUAL, numbers[column] or 0, DENY_EPERM)
    # The C library goes on to `clone`, whose flags can be looked at: those of clone3 are behind a pointer.
    code.when(_EQUAL, _CLONE3[column], DENY_ENOSYS)
    code.if_argument(_CLONE[column], 0, lambda inner: inner.when(_ANY_BIT, NEW_NAMESPACES, DENY_EPERM))
    code.if_argument(_TGKILL[column], 0, lambda inner: inner.unless(_EQUAL, own_pid, DENY_EPERM))
    if nests:
        code.when(_EQUAL, _GETEUID[column], ANSWER_0)
    if sockets:
        # Nobody changes what guards a network, whatever else he may do there.
        code.if_argument(_SOCKET[column], 2, lambda inner: inner.when(_EQUAL, _NETLINK_NETFILTER, DENY_EPERM))
        code.if_argument(_SOCKET[column], 0, _deny_other_families)
    # Reading a limit is fine, setting one isn't: both halves of the pointer to the new one have to be zero.
    code.if_argument(_PRLIMIT[column], 2, lambda inner: inner.unless(_EQUAL, 0, DENY_EPERM))
    code.if_argument(_PRLIMIT[column], 2, lambda inner: inner.unless(_EQUAL, 0, DENY_EPERM), high=True)
    code.if_argument(_IOCTL[column], 1, _deny_typing)
    code.if_argument(_MMAP[column], 3, _deny_uncounted_memory)
    if serves_files:
        _deny_for_server(code, column)
    code.give(ALLOW)
    return code.assembled


def _deny_other_families(code: "_Program") -> None:
    """Raw packets, the kernel's cryptography, other machines' vsock and the like are no helper's business."""
    for family in _FAMILIES:
        code.when(_EQUAL, family, ALLOW)
    code.give(DENY_EPERM)


def _deny_uncounted_memory(code: "_Program") -> None:
    """Shared memory without a file is no process's data, so no limit of a process holds for it."""
    code.mask(_SHARED_ANONYMOUS)
    code.when(_EQUAL, _SHARED_ANONYMOUS, DENY_EPERM)


def _deny_for_server(code: "_Program", column: int) -> None:
    for numbers in _FORKING:
        if (number := numbers[column]) is not None:
            code.when(_EQUAL, number, DENY_EPERM)
    # Its mode is behind a pointer.
    code.when(_EQUAL, _OPENAT2[column], DENY_ENOSYS)
    for numbers, argument in _MODES:
        if (number := numbers[column]) is not None:
            code.if_argument(number, argument, lambda inner: inner.when(_ANY_BIT, _SET_ID_BITS, DENY_EPERM))


def _deny_typing(code: "_Program") -> None:
    """Nothing is put into a terminal's input as if it had been typed there."""
    code.when(_EQUAL, _TERMINAL_INPUT, DENY_EPERM)
    code.when(_EQUAL, _TERMINAL_PASTE, DENY_EPERM)


class _Program:
    """Instructions in the order in which they run; jumps go over what follows them."""

    def __init__(self) -> None:
        self.assembled = b""

    def _add(self, operation: int, operand: int, true: int = 0, false: int = 0) -> None:
        self.assembled += struct.pack("<HBBI", operation, true, false, operand)

    def load(self, offset: int) -> None:
        self._add(_LOAD, offset)

    def mask(self, bits: int) -> None:
        self._add(_AND, bits)

    def give(self, answer: int) -> None:
        self._add(_RETURN, answer)

    def when(self, comparison: int, value: int, answer: int) -> None:
        self._add(comparison, value, true=0, false=1)
        self.give(answer)

    def unless(self, comparison: int, value: int, answer: int) -> None:
        self._add(comparison, value, true=1, false=0)
        self.give(answer)

    def if_argument(self, number: int, index: int, check: Callable[["_Program"], None], *, high: bool = False) -> None:
        """For one system call: load half of an argument, check that, and go on with the number."""
        inner = _Program()
        inner.load(_ARGUMENTS + 8 * index + (4 if high else 0))
        check(inner)
        inner.load(_NUMBER)
        self._add(_EQUAL, number, true=0, false=len(inner.assembled) // 8)
        self.assembled += inner.assembled
