"""Keeping, restoring and copying running machines, beside the same steps by hand on QMP and beside virsh."""

import asyncio
import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import atoll
from atoll.host import facts
from atoll.host.sockets import connect
from atoll.model.isolation import IsolationLevel
from atoll.model.requests import DiskRequest
from atoll.model.spec import DiskSpec
from atoll.operations.boot import Incoming, make_plan
from atoll.operations.services import Services
from atoll.operations.template import memory_path, shared_memory
from atoll.qemu.devices import file_node_name, head_node
from bench import libvirt, raw
from bench.harness import Case, Figures, Goal, measure
from bench.ours import Atoll
from bench.wire import Wire, negotiate

NAME = "history"
TOUCHED = "dd if=/dev/urandom of=/dev/shm/touched bs=1M count=150 2>/dev/null"
"""Makes the guest's memory hold about 185 MB."""
HEARTBEAT = "while :; do echo .; done"
SETTLE = 0.3
"""Seconds of the heartbeat before and after what is measured."""
FORKS = 100
CHANGED = 100_000_000
"""Bytes between two backups."""
GIB = 1 << 30


class Side:
    """One VM of a 512 MiB guest that has touched its memory, and a snapshot of it."""

    def __init__(self, ours: Atoll, folder: Path, *, name: str = NAME, isolation: IsolationLevel = "standard") -> None:
        self.ours = ours
        self.folder = folder
        self.host = atoll.connect(ours.layout).__enter__()
        self.vm = self.host.run("tiny", name=name, memory="512MiB", isolation=isolation, timeout=120)
        self._sh(TOUCHED)
        self.vm.snapshot("kept")
        self.number = 0

    def close(self) -> None:
        for info in self.host.ls():
            if info.vm.name.startswith(NAME):
                self.host.get(info.vm.id).rm(force=True)
        self.host.__exit__(None, None, None)

    def _sh(self, script: str) -> None:
        result = self.vm.exec(["sh", "-c", script])
        if result.exit_code != 0:
            raise RuntimeError(result.stderr.decode(errors="replace"))

    def socket(self, name: str) -> Path:
        return self.ours.layout.vm(self.vm.id).socket(name)

    # The longest silence of the guest

    def pause(self) -> float:
        """While Atoll takes a snapshot."""
        self.number += 1
        name = f"s{self.number}"
        seconds = self._silence(lambda: self.vm.snapshot(name))
        self.vm.forget(name)
        return seconds

    def pause_by_hand(self) -> float:
        """While the same is done by QMP commands, which a confined QEMU couldn't do: they name files by their paths.

        Afterwards Atoll restores what it knows.
        """
        memory, head = self.folder / "memory", self.folder / "head.qcow2"
        disk = self.vm.info().vm.spec.disks[0]
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(head), str(disk.size)]
        subprocess.run(argv, check=True, capture_output=True)
        try:
            return self._silence(lambda: _snapshot_by_hand(self.socket("control"), memory, head, disk))
        finally:
            memory.unlink(missing_ok=True)
            self.vm.restore("kept")

    def _silence(self, act: Callable[[], object]) -> float:
        self._sh(f"({HEARTBEAT}) > /dev/ttyS0 2>&1 & echo $! > /tmp/heartbeat")
        try:
            with contextlib.closing(connect(self.socket("serial"))) as line:
                line.setblocking(True)
                return longest_silence(line.recv, act)
        finally:
            self._sh("kill $(cat /tmp/heartbeat)")

    # Going on

    def restore(self) -> float:
        began = time.perf_counter()
        self.vm.restore("kept")
        return time.perf_counter() - began

    def incoming(self, *, shared: bool) -> raw.ByHand:
        """A command line that waits for the snapshot's memory, with disks of its own."""
        clone = self.host.clone(f"{NAME}@kept", f"{NAME}-by-hand-{shared}")
        self.ours.layout.vm(clone.id).run.mkdir(parents=True, exist_ok=True)
        return asyncio.run(_planned(self.ours, clone.id, shared=shared, sockets=self.folder))

    def fork(self) -> float:
        began = time.perf_counter()
        (made,) = self.host.fork(f"{NAME}@kept", name=f"{NAME}-fork")
        seconds = time.perf_counter() - began
        made.rm(force=True)
        return seconds

    def fork_running(self) -> float:
        began = time.perf_counter()
        (made,) = self.vm.fork(name=f"{NAME}-fork")
        seconds = time.perf_counter() - began
        made.rm(force=True)
        return seconds

    def fork_from_pool(self) -> float:
        self.host.pools.fill(f"{NAME}@kept", 1)
        began = time.perf_counter()
        made = self.host.pools.take(f"{NAME}@kept", f"{NAME}-taken")
        seconds = time.perf_counter() - began
        made.rm(force=True)
        return seconds

    def clone(self) -> float:
        began = time.perf_counter()
        made = self.host.clone(f"{NAME}-large@kept", f"{NAME}-clone")
        seconds = time.perf_counter() - began
        made.rm()
        return seconds


def longest_silence(receive: Callable[[int], bytes], act: Callable[[], object]) -> float:
    """The longest time between two things said while `act` is done."""
    times: list[float] = []
    ended = threading.Event()

    def listen() -> None:
        while not ended.is_set() and receive(1 << 16):
            times.append(time.perf_counter())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    time.sleep(SETTLE)
    began = time.perf_counter()
    act()
    time.sleep(SETTLE)
    over = time.perf_counter()
    ended.set()
    listener.join(timeout=5)
    heard = [at for at in times if began - 0.05 <= at <= over]
    if len(heard) < 10:
        raise RuntimeError("the guest's heartbeat wasn't heard")
    return max(later - earlier for earlier, later in pairwise(heard))


def _snapshot_by_hand(control: Path, memory: Path, head: Path, disk: DiskSpec) -> None:
    node = "by-hand"
    with Wire(control) as monitor:
        negotiate(monitor)
        file = {"driver": "file", "node-name": file_node_name(node), "filename": str(head)}
        monitor.ask("blockdev-add", **file)
        overlay = {"driver": "qcow2", "node-name": node, "file": file_node_name(node), "backing": None}
        monitor.ask("blockdev-add", **overlay)
        names = ("background-snapshot", "mapped-ram")
        capabilities = [{"capability": name, "state": True} for name in names]
        monitor.ask("migrate-set-capabilities", capabilities=capabilities)
        monitor.ask("stop")
        action = {"type": "blockdev-snapshot", "data": {"node": head_node(disk), "overlay": node}}
        monitor.ask("transaction", actions=[action])
        monitor.ask("migrate", uri=f"file:{memory}")
        while not monitor.ask("query-migrate").get("ram", {}).get("normal", 0):
            pass
        monitor.ask("cont")
        while monitor.ask("query-migrate")["status"] != "completed":
            time.sleep(0.01)


async def _planned(ours: Atoll, vm_id: str, *, shared: bool, sockets: Path) -> raw.ByHand:
    services = Services(ours.layout)
    try:
        vm = services.vm(vm_id)
        node = next(each for each in services.records.snapshots() if each.id == vm.snapshot)
        assert node.memory is not None
        incoming = Incoming(memory_path(ours.layout, node.memory))
        if shared:
            incoming = await shared_memory(services, node.memory)
        spec = node.spec
        # Its hardware is the snapshot's, its disks are its own.
        heads = {disk.name: disk for disk in vm.spec.disks}
        plan, accelerator = await make_plan(services, vm, _with_heads(spec, heads), incoming=incoming)
        return raw.ByHand(plan=plan, accelerator=accelerator, sockets=sockets, stream=incoming.stream)
    finally:
        services.close()


def _with_heads(spec: Any, heads: dict[str, DiskSpec]) -> Any:
    from msgspec.structs import replace

    return replace(spec, disks=tuple(heads[disk.name] for disk in spec.disks))


def many_forks(side: Side) -> Iterator[Figures]:
    """A hundred copies at once: the time until all run, and what each takes."""
    began = time.perf_counter()
    made = side.host.fork(f"{NAME}@kept", FORKS, name=f"{NAME}-many-{{n}}")
    seconds = time.perf_counter() - began
    own, code = [], []
    for vm in made:
        run = vm.info().vm.run
        assert run is not None
        own.append(facts.memory_private(run.pid) / 2**20)
        code.append(_translated(run.pid) / 2**20)
    with ThreadPoolExecutor(8) as removers:
        list(removers.map(lambda vm: vm.rm(force=True), made))
    each, without = sum(own) / len(own), (sum(own) - sum(code)) / len(own)
    yield Figures(f"fork {FORKS}", "ms", (Goal(limit=8000),), {"atoll": [seconds * 1000]})
    yield Figures("private memory of a fork", "MiB", (), {"atoll": [each]})
    yield Figures("the same without translated code", "MiB", (), {"atoll": [without]})
    # The other way round than the other goals: more is better, so it is told and not judged.
    yield Figures("such forks in 20 GiB (aim: 400 or more)", "", (), {"atoll": [float(int(20 * 1024 / each))]})


def _translated(pid: int) -> float:
    """Private bytes of the mappings that hold translated code: the only ones that can be executed and belong to no
    file.
    """
    total, executable = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            executable = "x" in words[1] and (len(words) < 6 or words[5].startswith(("/memfd:tcg", "[anon")))
        elif executable and words[0].startswith("Private_"):
            total += int(words[1]) * 1024
    return float(total)


def backups(side: Side, repetitions: int) -> Iterator[Figures]:
    """What an incremental backup reads and writes for each byte that has changed."""
    disk = DiskRequest(name="data", size="10GiB")
    vm = side.host.create("tiny", name=f"{NAME}-backup", memory="512MiB", disks=(disk,))
    vm.start(wait=True, timeout=120)
    folder = side.folder / "backups"
    case = "incremental backup of 100 MB on a 10 GiB disk"
    rows = [Figures(f"{case}: {verb}", "× changed", (Goal(limit=1.2),)) for verb in ("read", "written")]
    seconds = Figures("the same: time", "ms", ())
    for number in range(repetitions + 1):
        script = f"dd if=/dev/urandom of=/dev/vdb bs=1000000 count=100 seek={number * 70} conv=fsync 2>/dev/null"
        if vm.exec(["sh", "-c", script]).exit_code != 0:
            raise RuntimeError("the guest couldn't write")
        before, began = _own_io(), time.perf_counter()
        vm.backup(folder)
        took, after = time.perf_counter() - began, _own_io()
        if number:  # the first one copies the whole disk
            seconds.values.setdefault("atoll", []).append(took * 1000)
            for row, was, now in zip(rows, before, after, strict=True):
                row.values.setdefault("atoll", []).append((now - was) / CHANGED)
    vm.rm(force=True)
    yield from (*rows, seconds)


def _own_io() -> tuple[int, int]:
    """Bytes that this process has read and written in its life, from a disk or not."""
    words = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(words["rchar"]), int(words["wchar"])


def figures(ours: Atoll, folder: Path, repetitions: int, tell: Callable[[str], None], *, peers: bool) -> list[Figures]:
    """All cases of this page."""
    folder.mkdir()
    side = Side(ours, folder)
    try:
        loose = Side(ours, folder, name=f"{NAME}-loose", isolation="none")
        rows = [measure(case, tell) for case in _cases(side, loose, repetitions, peers=peers)]
        rows += backups(side, min(repetitions, 3))
        return [*rows, *(many_forks(side) if repetitions > 2 else ())]
    finally:
        side.close()


def _cases(side: Side, loose: Side, repetitions: int, *, peers: bool) -> Iterator[Case]:
    silences = {"atoll": side.pause, "raw": loose.pause_by_hand}
    restores = {"atoll": side.restore, "raw": lambda: raw.resumed(side_whole)}
    if peers:
        silences["virsh"] = libvirt.pause
        restores["virsh"] = libvirt.restore
    with libvirt.touched(TOUCHED) if peers else contextlib.nullcontext():
        yield Case("longest silence in a live snapshot", repetitions, silences, (Goal("raw", plus=30),))
        loose.vm.rm(force=True)
        side_whole = side.incoming(shared=False)
        yield Case("restore to running", repetitions, restores, (Goal("raw", 1.3),))
    by_hand = side.incoming(shared=True)
    forks = {"atoll": side.fork, "raw": lambda: raw.resumed(by_hand)}
    yield Case("fork of a snapshot", repetitions, forks, (Goal("raw", 1.25),))
    yield Case("fork of a running VM", repetitions, {"atoll": side.fork_running})
    yield Case("fork from a pool", repetitions, {"atoll": side.fork_from_pool}, (Goal(limit=15),))
    large = side.host.create("tiny", name=f"{NAME}-large", disk_size="100GiB")
    large.snapshot("kept")
    yield Case("linked clone of a 100 GiB disk", repetitions, {"atoll": side.clone}, (Goal(limit=50),))
