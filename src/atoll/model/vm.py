"""The record of a VM and what is told about it."""

from typing import Any, Literal

from msgspec import Struct, field

from atoll.model.isolation import Isolation
from atoll.model.names import SHORT_ID
from atoll.model.pressure import PressurePolicy
from atoll.model.snapshot import Memory
from atoll.model.spec import VmSpec
from atoll.model.state import Phase, Trouble
from atoll.model.supervision import EndReason, RestartPolicy, SuspendReason


class Run(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The QEMU process of the last start. With the boot's id, pid and start time name a process for ever."""

    pid: int
    start_time: int
    """Clock ticks since the host's boot (`/proc/PID/stat`, field 22)."""
    boot_id: str
    started_at: float
    accelerator: str
    qemu_version: str
    isolation: Isolation | None = None
    """What keeps it in; None for one that an older Atoll started."""
    start_count: int = 1
    from_memory: bool = False
    """It didn't boot, but went on from memory that was saved."""


class Exit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the last run ended, as far as there is evidence."""

    at: float
    reason: EndReason
    detail: str = ""
    """The QMP event, the signal, or QEMU's last words."""
    last_lines: str = ""
    """What the guest wrote last on its serial line, when it wasn't stopped by us."""
    asked: bool = False
    """Somebody stopped it, so nobody starts it again."""


class Vm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM as it is recorded. Its phase isn't here: that is observed."""

    id: str
    name: str
    image: str
    """The name of the image it was made from, for people; the layers are in the spec."""
    created_at: float
    spec: VmSpec
    pending: VmSpec | None = None
    """The spec that the next start takes, when `set` changed something that can't change live."""
    run: Run | None = None
    """Set when it was started; cleared when its end was recorded."""
    last_exit: Exit | None = None
    seeded: bool = False
    """The first boot reached `ready`, so the seed has done its work."""
    pool: str | None = None
    """The snapshot whose pool it waits in, started and standing still."""
    snapshot: str | None = None
    """The snapshot that its heads stand on: the parent of the next one."""
    suspended: Memory | None = None
    """What the next start goes on from; its heads are as they were at that instant."""
    suspended_because: SuspendReason = "asked"
    """Of the last time. `idle` and `memory` are the agent's: it lets such a VM go on by itself."""
    labels: dict[str, str] = field(default_factory=dict)
    remove_when_stopped: bool = False
    restart: RestartPolicy = "never"
    """What a host's agent does when it has ended. This and the next two are the VM's own: copies don't have them."""
    autostart: bool = False
    """The agent starts it when the computer has started."""
    boot_order: int = 0
    """Lower numbers are started first, and stopped last; those of one number side by side."""
    memory_min: int | None = None
    """What it is always left when the computer's memory is short; None for half of what it has. The VM's own as well,
    and the next one.
    """
    on_memory_pressure: PressurePolicy = "suspend"
    """What a host's agent may do to it then."""

    @property
    def short_id(self) -> str:
        return self.id[:SHORT_ID]

    @property
    def uuid(self) -> str:
        """The id in the form that QEMU's `-uuid` takes."""
        i = self.id
        return f"{i[:8]}-{i[8:12]}-{i[12:16]}-{i[16:20]}-{i[20:]}"


ShareState = Literal["shared", "stopped", "not-mounted", "ended"]
"""`stopped` with the VM; `not-mounted` until the guest has it; `ended` when what serves it has ended."""


class ShareInfo(Struct, frozen=True, kw_only=True):
    """A folder that a VM shares, and whether it does at this moment."""

    host_path: str
    guest_path: str
    read_only: bool
    state: ShareState


class VmInfo(Struct, frozen=True, kw_only=True):
    """A VM as `ls` and `show` tell it: its record and what was observed."""

    vm: Vm
    phase: Phase
    operation: str | None = None
    """The verb that works on it at this moment."""
    exit: Exit | None = None
    trouble: Trouble | None = None
    """Why it is paused or crashed, when nobody asked for that."""
    stands_on: str | None = None
    """The snapshot that it stands on: its name, `VM@NAME` for another VM's. Of one VM only: lists leave it away."""
    shares: tuple[ShareInfo, ...] = ()
    """Of one VM only."""


class Stopped(Struct, frozen=True, kw_only=True):
    """What became of a VM when all were stopped."""

    id: str
    name: str
    outcome: Literal["stopped", "suspended", "failed", "nothing"]
    """`nothing`: it had ended already."""
    error: str = ""


class PoolInfo(Struct, frozen=True, kw_only=True):
    """Copies of a snapshot that wait."""

    snapshot_id: str
    name: str
    """`VM@SNAPSHOT`; the id when that was forgotten."""
    ready: tuple[str, ...]
    """The names of those that wait."""


class CardStats(Struct, frozen=True, kw_only=True):
    """What passed through a card, as the guest sees it: received is what came to it."""

    nic: str
    network: str | None
    """The id of the network that it is on; None for one of its own."""
    received: int
    """Bytes."""
    sent: int
    packets_received: int
    packets_sent: int


class Stats(Struct, frozen=True, kw_only=True):
    """One reading of a running VM's use; counters since its start."""

    at: float
    cpu_seconds: float
    memory_resident: int
    memory_given: int
    disk_read: int
    disk_written: int
    net_received: int | None = None
    """Of all cards whose counters are known; None when there is none."""
    net_sent: int | None = None
    cards: tuple[CardStats, ...] = ()
    """Those on networks as this computer counts them, those of user-mode networks as the guest's agent does."""


class HostMemory(Struct, frozen=True, kw_only=True):
    """The computer's memory, and what its running VMs make of it; bytes."""

    total: int
    available: int
    """What new programs can take."""
    vms: int
    """How many run."""
    promised: int
    """What they may take together."""
    used: int
    """What they have mapped; what several have is counted once."""
    shared: int
    """The part of it that several have mapped: memory of forks that none has written to yet, QEMU's own program."""
    saved: int
    """What those that run would take besides if each had its own of what they share, merged pages left out."""
    merging: bool = False
    """Whether the kernel merges equal pages (`atoll serve --merge-pages`)."""
    merged: int = 0
    """What they would take besides without that."""
    reserve: int = 0
    """What the computer's agent keeps for it; 0 without an agent that does. The rest is the agent's, too."""
    low: bool = False
    """There is less than that."""
    held_back: int = 0
    """What balloons hold back of what VMs were promised."""
    asleep: int = 0
    """VMs that were suspended since memory was short; they go on when there is some."""


class Event(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that happened: an operation's end, or a change of phase."""

    id: int
    at: float
    kind: str
    """`vm.created`, `vm.started`, `vm.stopped`, `operation.undone`, `image.added` …"""
    vm_id: str | None = None
    name: str = ""
    data: dict[str, Any] = field(default_factory=dict)


class ExecRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command to run in the guest."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    timeout: float | None = None
    """Seconds after which the command and its children are killed."""


class ExecResult(Struct, frozen=True, kw_only=True):
    """How a command in the guest ended."""

    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def text(self) -> str:
        """Standard output as text, without the newline at its end."""
        return self.stdout.decode(errors="replace").removesuffix("\n")


class Change(Struct, frozen=True, kw_only=True):
    """What `set` did: each setting with its new value, and when it holds."""

    name: str
    value: str
    when: Literal["now", "next-start"]
    why: str = ""
