"""In a guest whose kernel has control groups of the second version: what Atoll makes of them.

As `python3 second_groups.py USER GROUP`: goes into a group, becomes that user, lets a process in and says as JSON what
it is bounded by.
"""

import json
import os
import sys
import time
from pathlib import Path

from atoll.host import cgroups, kernel

WANTED = cgroups.Wanted(processes=10, cpus=0.2, weight=50, memory=64 << 20)


def busy(entrances: tuple[str, ...], seconds: float = 2.0) -> float:
    """Processors' time that a process in there gets in a second of a busy loop."""
    child = os.fork()
    if child == 0:
        for path in entrances:
            Path(path).write_text("0")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        os._exit(0)
    usage = os.wait4(child, 0)[2]
    return (usage.ru_utime + usage.ru_stime) / seconds


def main(user: int, group: str) -> None:
    (Path("/sys/fs/cgroup") / group / "cgroup.procs").write_text(str(os.getpid()))
    os.setgid(user)
    os.setuid(user)
    made = cgroups.make("vm", WANTED)
    told = {"version": made.version, "bounded": sorted(made.bounded), "why": made.why}
    told["writable"] = sorted(kernel.cgroups().writable & {"cpu", "memory", "pids"})
    if made.version == 2:
        folder = Path(made.entrances[0]).parent
        told["folder"] = str(folder.parent)
        names = ("pids.max", "cpu.max", "cpu.weight", "memory.max")
        told["settings"] = {name: (folder / name).read_text().strip() for name in names}
        told["found again"] = cgroups.entrances("vm") == made.entrances
        told["share"] = busy(made.entrances)
        told["changed"] = cgroups.change_cpus("vm", 0.5)
        told["then"] = (folder / "cpu.max").read_text().strip()
    cgroups.remove("vm", within=1)
    told["left"] = [str(each) for each in Path("/sys/fs/cgroup").glob("**/vm.*")]
    print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
