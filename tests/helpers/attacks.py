"""What a program that has broken out of a guest would try. `confined.py` runs it behind barriers.

Reads what to try, and on what, as JSON from descriptor 3, and writes what came of it to 4: `open`, or what kept it from
that. An end without a word is the kernel's: a filter may kill.

Nothing here harms: system calls get arguments that the kernel refuses if it lets them in at all, signals are number 0,
and files, sockets and processes are the test's own. It uses nothing but the standard library.
"""

import ctypes
import errno
import json
import mmap
import os
import resource
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
Targets = dict[str, Any]
REFUSED = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ESRCH}
AF_UNIX, AF_INET, AF_NETLINK, AF_PACKET, STREAM, DATAGRAM, RAW, NETFILTER = 1, 2, 16, 17, 1, 2, 3, 12


class Blocked(Exception):
    """The attack failed in a way that has no error number."""


def call(number: int, *arguments: Any) -> int:
    """A system call by its x86-64 number; one that is let in and refuses nonsense counts as open."""
    ctypes.set_errno(0)
    result = int(libc.syscall(number, *arguments))
    if result < 0 and ctypes.get_errno() in REFUSED:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(16)


def socket(family: int, kind: int, protocol: int = 0) -> int:
    number = int(libc.socket(family, kind, protocol))
    if number < 0:
        raise OSError(ctypes.get_errno(), "socket")
    return number


def connect(family: int, kind: int, address: bytes) -> None:
    number = socket(family, kind)
    try:
        if libc.connect(number, address, len(address)) < 0:
            raise OSError(ctypes.get_errno(), "connect")
        if kind == DATAGRAM and libc.send(number, b"x", 1, 0) < 0:
            raise OSError(ctypes.get_errno(), "send")
    finally:
        os.close(number)


def internet(host: str, port: int) -> bytes:
    return struct.pack("<H", AF_INET) + struct.pack(">H4s8x", port, bytes(map(int, host.split("."))))


def local(path: bytes) -> bytes:
    return struct.pack("<H", AF_UNIX) + path


def list_processes(targets: Targets) -> None:
    if str(targets["victim"]) not in os.listdir("/proc"):
        raise Blocked("not there")


def write_to_host(targets: Targets) -> None:
    path = f"{targets['open_folder']}/written"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    os.unlink(path)


def make_file(targets: Targets) -> None:
    os.close(os.open("written", os.O_WRONLY | os.O_CREAT, 0o600))
    os.unlink("written")


def traced(targets: Targets) -> None:
    if libc.ptrace(16, targets["victim"], 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(targets["victim"], 0)
    libc.ptrace(17, targets["victim"], 0, 0)


def read_memory(targets: Targets) -> None:
    buffer = ctypes.create_string_buffer(8)
    here = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)
    there = (ctypes.c_uint64 * 2)(targets["victim_address"], 8)
    ctypes.set_errno(0)
    if libc.process_vm_readv(targets["victim"], ctypes.byref(here), 1, ctypes.byref(there), 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")


def fork_bomb(targets: Targets) -> None:
    """As many sleeping children as there may be; open when there can be more than a VM has threads."""
    children = []
    waiting, going = os.pipe()
    try:
        for _ in range(targets["threads"] + 50):
            child = os.fork()
            if child == 0:
                os.close(going)
                os.read(waiting, 1)
                os._exit(0)
            children.append(child)
    except OSError as error:
        raise Blocked(f"{errno.errorcode[error.errno or 0]} after {len(children)}") from error
    finally:
        os.close(going)
        for child in children:
            os.waitpid(child, 0)


def thread_bomb(targets: Targets) -> None:
    stop = threading.Event()
    running = []
    try:
        for _ in range(targets["threads"] + 50):
            thread = threading.Thread(target=stop.wait)
            thread.start()
            running.append(thread)
    except RuntimeError as error:
        raise Blocked(f"no more after {len(running)}") from error
    finally:
        stop.set()


def take_memory(targets: Targets) -> None:
    """Twice what its machine has; the kernel may refuse it, or end who takes too much."""
    taken = mmap.mmap(-1, 2 * targets["memory"], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, len(taken), 4096):
        taken[offset] = 1


def fill_disk(targets: Targets) -> None:
    """Beyond what its largest disk may come to, in a file that it has open for writing."""
    descriptor = targets["disk_descriptor"]
    os.pwrite(descriptor, b"x", targets["largest_file"] + 4096)


def raise_limit(targets: Targets) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except ValueError as error:
        # What Python makes of EPERM.
        raise Blocked("EPERM") from error


def run_shell(targets: Targets) -> None:
    os.execv("/bin/sh", ["sh", "-c", "echo open >&4"])


def new_user_namespace(targets: Targets) -> None:
    call(272, ctypes.c_ulong(0x10000000))


def clone_into_namespace(targets: Targets) -> None:
    child = call(56, ctypes.c_ulong(0x10000000 | 17), 0, 0, 0, 0)
    if child == 0:
        libc._exit(0)
    if child > 0:
        os.waitpid(child, 0)


def by_handle(targets: Targets) -> None:
    """A made-up handle of 8 bytes, on the root's file system."""
    call(304, os.open("/", os.O_RDONLY), struct.pack("<Ii8x", 8, 1), 0)


def uring(targets: Targets) -> None:
    os.close(call(425, 4, ctypes.create_string_buffer(120)))


ATTACKS: dict[str, Callable[[Targets], Any]] = {
    "read another VM's disk": lambda t: read(t["disk"]),
    "read another VM's memory file": lambda t: read(t["memory_file"]),
    "connect to another VM's control socket": lambda t: connect(AF_UNIX, STREAM, local(t["socket"].encode())),
    "read the host's passwords": lambda t: read("/etc/shadow"),
    "read a private key": lambda t: read(t["key"]),
    "read another process's environment": lambda t: read(f"/proc/{t['victim']}/environ"),
    "list processes": list_processes,
    "write to the host": write_to_host,
    "make a file where it works": make_file,
    "TCP to the host's loopback": lambda t: connect(AF_INET, STREAM, internet("127.0.0.1", t["tcp"])),
    "UDP to the host's loopback": lambda t: connect(AF_INET, DATAGRAM, internet("127.0.0.1", t["udp"])),
    "TCP to the host's network": lambda t: connect(AF_INET, STREAM, internet(t["address"], t["tcp_any"])),
    "abstract socket": lambda t: connect(AF_UNIX, STREAM, local(b"\0" + t["abstract"].encode())),
    "raw socket": lambda t: os.close(socket(AF_INET, RAW, 1)),
    "signal another process": lambda t: os.kill(t["victim"], 0),
    "trace another process": traced,
    "read another process's memory": read_memory,
    "take another process's descriptor": lambda t: call(438, call(434, t["victim"], 0), 0, 0),
    "open /dev/kvm": lambda t: os.close(os.open("/dev/kvm", os.O_RDWR)),
    "open a block device": lambda t: os.close(os.open(t["block_device"], os.O_RDONLY)),
    "open /dev/net/tun": lambda t: os.close(os.open("/dev/net/tun", os.O_RDWR)),
    "load a BPF program": lambda t: call(321, 5, None, 0),
    "io_uring": uring,
    "kernel keyrings": lambda t: call(250, 0, ctypes.c_int(-3), 0, 0, 0),
    "userfaultfd for the kernel's faults": lambda t: call(323, 0),
    "performance counters": lambda t: call(298, None, 0, -1, -1, 0),
    "new user namespace": new_user_namespace,
    "clone into a user namespace": clone_into_namespace,
    "mount": lambda t: call(165, b"none", b"/", b"nothing", 0, None),
    "become root": lambda t: call(105, 0) if os.getuid() else call(117, 0, 0, 0),
    "load a kernel module": lambda t: call(175, None, 0, None),
    "load another kernel": lambda t: call(246, 0, ctypes.c_ulong(99), None, ctypes.c_ulong(0xFFFF)),
    "open a file by its handle": by_handle,
    "fork bomb": fork_bomb,
    "thread bomb": thread_bomb,
    "twice its memory": take_memory,
    "fill the disk": fill_disk,
    "raise its own limits": raise_limit,
    "change a network's guards": lambda t: os.close(socket(AF_NETLINK, RAW, NETFILTER)),
    "packets of its own making": lambda t: os.close(socket(AF_PACKET, RAW)),
    "enter the host's network": lambda t: call(308, os.open("/proc/1/ns/net", os.O_RDONLY), 0),
    "run a shell": run_shell,
}  # fmt: skip


def shut_in_further() -> None:
    """What slirp4netns does by `--enable-sandbox` before it reads anything (its sandbox.c): a root of its own that is
    read-only and has /etc and /run, and no privilege but ports below 1024.
    """
    private, bind, remount, nothing_special = 1 << 18, 1 << 12, 1 << 5 | 1, 0xE
    _done(libc.unshare(0x00020000), "unshare")
    _done(libc.mount(b"", b"/", b"", private, None), "mount")
    _done(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", nothing_special, b"size=1k"), "tmpfs")
    for folder in (b"/etc", b"/run"):
        os.mkdir(b"/tmp" + folder)
        _done(libc.mount(folder, b"/tmp" + folder, b"", bind, None), "bind")
        _done(libc.mount(b"", b"/tmp" + folder, b"", bind | remount | nothing_special, None), "remount")
    os.mkdir("/tmp/old")
    _done(libc.syscall(155, b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    _done(libc.umount2(b"/old", 2), "umount")
    os.rmdir("/old")
    _done(libc.mount(b"tmpfs", b"/", b"tmpfs", remount | nothing_special, b"size=0k"), "remount")
    for number in range(64):
        if number != 10:
            libc.prctl(24, number, 0, 0, 0)
    kept = 1 << 10
    data = struct.pack("<6I", kept, kept, 0, 0, 0, 0)
    _done(libc.syscall(126, struct.pack("<Ii", 0x20080522, 0), data), "capset")
    # What it had as ambient ones has gone with that.


def _done(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)


def load_filters(programs: list[str]) -> None:
    """The filters of a real QEMU, as read from it."""
    libc.prctl(38, 1, 0, 0, 0)
    for program in programs:
        code = ctypes.create_string_buffer(bytes.fromhex(program), len(program) // 2)
        header = (ctypes.c_uint64 * 2)(len(code) // 8, ctypes.addressof(code))
        if libc.prctl(22, 2, ctypes.byref(header), 0, 0) < 0:
            raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    with os.fdopen(3) as file:
        targets: Targets = json.load(file)
    if targets["sandbox"]:
        shut_in_further()
    load_filters(targets["filters"])
    try:
        ATTACKS[targets["attack"]](targets)
        said = "open"
    except OSError as error:
        said = errno.errorcode.get(error.errno or 0, str(error))
    except Blocked as error:
        said = str(error)
    os.write(4, said.encode())


if __name__ == "__main__":
    sys.exit(main())
