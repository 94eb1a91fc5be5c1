"""Facts about this computer and its processes, read from /proc and /sys. Nothing here changes anything.

Imported by every command, so nothing slow is imported here. Field numbers and file names are those of proc(5).
"""

import contextlib
import os
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

from msgspec import Struct

from atoll.errors import StorageFailed, from_os_error
from atoll.model.spec import Arch
from atoll.model.units import format_size

PROC = Path("/proc")
KVM = Path("/dev/kvm")


class Identified(Protocol):
    """Anything that names a process for ever: a `ProcessIdentity`, a VM's `Run`, an operation's `Owner`."""

    @property
    def pid(self) -> int: ...
    @property
    def start_time(self) -> int: ...
    @property
    def boot_id(self) -> str: ...


class ProcessIdentity(Struct, frozen=True, kw_only=True):
    """A pid is given again; with the start time and the boot it never is."""

    pid: int
    start_time: int
    """Clock ticks since the host's boot (`/proc/PID/stat`, field 22)."""
    boot_id: str


@cache
def boot_id() -> str:
    """The random id that the kernel gave to this boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def identity_of(pid: int) -> ProcessIdentity | None:
    """The identity of a process that runs now; None when there is none, or only its zombie."""
    stat = _stat_of(pid)
    if stat is None:
        return None
    return ProcessIdentity(pid=pid, start_time=stat[1], boot_id=boot_id())


def is_alive(identity: Identified) -> bool:
    """Whether that very process still runs. A zombie, a later process of the same pid, or another boot's is dead."""
    if identity.boot_id != boot_id():
        return False
    stat = _stat_of(identity.pid)
    return stat is not None and stat[1] == identity.start_time


def scan_for(marker: str, *, after: str | None = None, also_user: int | None = None) -> list[int]:
    """The pids of this user's processes that have `marker` as a whole word of their argv; our own isn't told.

    With `also_user` those of another user, too: one that belongs to this one's VM.
    `after` is the word that must stand before it: `scan_for(uuid, after="-uuid")` finds a QEMU, but not a command of
    ours that was given the same id.
    """
    wanted, before = os.fsencode(marker), None if after is None else os.fsencode(after)
    found = []
    for name in os.listdir(PROC):  # noqa: PTH208 - listed by each command: a Path for each process is too slow
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        words = _argv_of(int(name))
        if any(
            word == wanted and (before is None or (index > 0 and words[index - 1] == before))
            for index, word in enumerate(words)
        ) and _user_of(int(name)) in (os.getuid(), also_user):
            found.append(int(name))
    return sorted(found)


def _stat_of(pid: int) -> tuple[str, int] | None:
    """State and start time of a process that isn't dead."""
    try:
        content = (PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, which may itself have spaces and parentheses.
    fields = content[content.rindex(b")") + 2 :].split()
    state, start_time = fields[0].decode(), int(fields[19])
    return None if state in "ZXx" else (state, start_time)


def _argv_of(pid: int) -> list[bytes]:
    try:
        descriptor = os.open(f"{PROC}/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        with os.fdopen(descriptor, "rb") as file:
            return file.read().split(b"\0")[:-1]
    except OSError:
        return []


def _user_of(pid: int) -> int:
    """The real user; -1 when it is gone."""
    # Not the folder's owner: that is root for a process that changed its user or its capabilities.
    try:
        status = (PROC / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return -1
    line = next((line for line in status.splitlines() if line.startswith("Uid:")), "Uid: -1")
    return int(line.split()[1])


class Cpu(Struct, frozen=True, kw_only=True):
    """The processors that this process may use."""

    count: int
    model: str
    flags: frozenset[str]
    """As in /proc/cpuinfo: `vmx` or `svm` tell that an x86 processor can run guests itself."""


class Memory(Struct, frozen=True, kw_only=True):
    """Bytes of the whole computer. `available` is what new programs can take without swapping."""

    total: int
    available: int


KvmState = Literal["usable", "absent", "forbidden", "broken"]

ARCHITECTURES: dict[str, Arch] = {
    "x86_64": "x86_64",
    "amd64": "x86_64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
    "riscv64": "riscv64",
}


def architecture() -> str:
    """This computer's processor architecture, by QEMU's name where QEMU has one."""
    machine = os.uname().machine
    return ARCHITECTURES.get(machine, machine)


def cpu() -> Cpu:
    """The processors, from /proc/cpuinfo (Arm's has no model name, and calls the flags features)."""
    entries: dict[str, str] = {}
    for line in (PROC / "cpuinfo").read_text(errors="replace").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            entries.setdefault(name.strip().lower(), value.strip())
    return Cpu(
        count=len(os.sched_getaffinity(0)),
        model=entries.get("model name") or entries.get("uarch") or architecture(),
        flags=frozenset((entries.get("flags") or entries.get("features") or "").split()),
    )


def memory() -> Memory:
    """The memory, from /proc/meminfo."""
    entries = {}
    for line in (PROC / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        entries[name] = int(value.split()[0]) * 1024
    return Memory(total=entries["MemTotal"], available=entries["MemAvailable"])


def free_disk(path: Path) -> int:
    """Bytes that this user can still write below `path`, which needn't exist yet. Raises `StorageFailed`."""
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise from_os_error(error, f"look at {folder}") from error
    return found.f_bavail * found.f_frsize


def disk_reserve(path: Path) -> int:
    """Bytes of the disk that strangers' files leave free: a fiftieth of it, and no more than 1 GiB."""
    found = os.statvfs(path)
    return min(found.f_blocks * found.f_frsize // 50, 1 << 30)


def check_room(path: Path, size: int, *, what: str, reserve: int = 0) -> None:
    """Raises `StorageFailed` when so many bytes don't fit below `path`, with a reserve of the computer's own."""
    free = free_disk(path)
    if size > free - reserve:
        kept = f", of which {format_size(reserve)} are kept for what runs here" if reserve else ""
        raise StorageFailed(
            f"{what} doesn't fit on the disk",
            f"it has {format_size(size)}, and {format_size(free)} are free{kept}",
            "Free some space (`atoll image prune`), then try again.",
        )


def waits_to_be_accepted(port: int) -> bool:
    """Whether a connection to a TCP port of this computer's (IPv4) is established, but not taken by its program yet."""
    listening, local = "0A", f":{port:04X}"
    for line in (PROC / "net/tcp").read_text().splitlines()[1:]:
        _, address, _, state, queues = line.split()[:5]
        if state == listening and address.endswith(local):
            return int(queues.partition(":")[2], 16) > 0
    return False


def connected_ports() -> set[int]:
    """The TCP ports of this computer that have connections, whichever side made them."""
    found = set()
    for file in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in (PROC / file).read_text().splitlines()[1:]:
                _, address, _, state, _, _, _, _, _, inode = line.split()[:10]
                # Those count, too, of which one side has ended its half, as long as a program has them
                # (include/net/tcp_states.h: FIN_WAIT2, CLOSE_WAIT).
                if state in ("01", "08") or (state == "05" and inode != "0"):
                    found.add(int(address.rpartition(":")[2], 16))
    return found


def kvm_state() -> KvmState:
    """Whether /dev/kvm can be opened. That doesn't prove that guests run: see `accelerator.py`."""
    try:
        descriptor = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return "absent"
    except PermissionError:
        return "forbidden"
    except OSError:
        return "broken"
    os.close(descriptor)
    return "usable"


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has used in all its threads; 0 when it is gone."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # utime and stime are fields 14 and 15 of the file, 12 and 13 after the name.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class MemoryShare(Struct, frozen=True, kw_only=True):
    """A process's memory; bytes."""

    resident: int
    proportional: int
    """Of pages that several processes have its part only."""
    private: int
    """What it shares with nobody."""


def memory_share(pid: int) -> MemoryShare:
    """From `smaps_rollup`. Raises `StorageFailed` when it is gone."""
    path = PROC / f"{pid}/smaps_rollup"
    try:
        lines = path.read_text().splitlines()[1:]
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    private = found["Private_Clean"] + found["Private_Dirty"]
    return MemoryShare(resident=found["Rss"], proportional=found["Pss"], private=private)


def memory_private(pid: int) -> int:
    """Bytes of memory that a process shares with nobody. Raises `StorageFailed` when it is gone."""
    return memory_share(pid).private


def threads_by_own_number(pid: int) -> dict[int, int]:
    """A process's threads on this host, by the numbers that it knows them by itself, in a pid namespace of its own
    (`NSpid` in proc_pid_status(5)); empty when it is gone.
    """
    found = {}
    with contextlib.suppress(OSError):
        for thread in (PROC / f"{pid}/task").iterdir():
            status = (thread / "status").read_text(errors="replace")
            line = next((line for line in status.splitlines() if line.startswith("NSpid:")), f"NSpid: {thread.name}")
            found[int(line.split()[-1])] = int(thread.name)
    return found


def thread_ran(pid: int, thread: int) -> float | None:
    """Seconds that a thread has had a processor for; None while it waits for something, or is gone."""
    folder = PROC / f"{pid}/task/{thread}"
    try:
        # The state stands behind the name, which may have any characters in it.
        if (folder / "stat").read_text().rpartition(") ")[2][0] != "R":
            return None
        return int((folder / "schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return None


def wanted_seconds(pid: int) -> dict[int, float]:
    """For how long each thread of a process has run or waited for a processor; nothing where that isn't told.

    Who would work, and doesn't get a processor, isn't told from an idle one by its processor time.
    """
    found = {}
    with contextlib.suppress(OSError):
        for thread in (PROC / f"{pid}/task").iterdir():
            with contextlib.suppress(OSError, ValueError):
                ran, waited = (thread / "schedstat").read_text().split()[:2]
                found[int(thread.name)] = (int(ran) + int(waited)) / 1e9
    return found


def memory_anonymous(pid: int) -> int:
    """Bytes that a process has in memory without a file behind them; 0 when it is gone. Quicker than `memory_share`."""
    try:
        _, resident, of_files, *_ = (PROC / str(pid) / "statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")


def memory_resident(pid: int) -> int:
    """Bytes of a process that are in memory; 0 when it is gone."""
    try:
        pages = int((PROC / str(pid) / "statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
