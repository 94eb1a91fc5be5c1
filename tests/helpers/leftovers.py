"""What a test may have left: processes are ended by their pid, logs of failed ones are kept."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

KEPT = ("serial.log", "qemu.log", "events.jsonl", "command.txt")


def processes_of(home: Path) -> dict[int, str]:
    """Processes whose working folder is below the home, or whose argv or environment names it: QEMUs, their helpers and
    tools that a test started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            argv = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = str((entry / "cwd").readlink())
            if argv and (where.startswith(f"{home}/") or f"{home}/" in argv or _has_folder_in(home, entry)):
                found[int(entry.name)] = argv[:120]
    return found


def _has_folder_in(home: Path, entry: Path) -> bool:
    """A program with a root of its own has nothing else that tells."""
    try:
        return f"ATOLL_FOLDER={home}/".encode() in (entry / "environ").read_bytes()
    except PermissionError:
        # It runs as a subordinate user, whose environment isn't this ordinary user's to read; its mounts are.
        # proc_pid_mountinfo(5): the fourth field is what is mounted, within its file system.
        mounts = (entry / "mountinfo").read_text().splitlines()
        return any(f"/{home.name}/" in line.split()[3] for line in mounts)


def end_processes_of(home: Path) -> dict[int, str]:
    # Layers that are being merged in the background are nobody's fault.
    deadline = time.monotonic() + 30
    while any("atoll.operations.merge" in argv for argv in processes_of(home).values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = processes_of(home)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cwd").exists() and _alive(pid) for pid in left) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def keep_logs(home: Path, where: Path) -> None:
    """Serial log, QMP events, QEMU's words and command line of each VM of a failed test."""
    if not os.access(where.parent.parent, os.W_OK):
        return  # Another user's checkout.
    for log in home.glob("data/**/log"):
        target = where / log.parent.name
        for name in KEPT:
            if (log / name).exists():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(log / name, target / name)
