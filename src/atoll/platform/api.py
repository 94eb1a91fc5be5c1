"""The façade: what a host and a VM can do, the same for this process, a socket or another machine.

`platform/local.py` does it in this process. `platform/blocking.py` has the same names without `await`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from atoll.model.audit import AuditEntry
from atoll.model.backup import Backup, Keep, Pruned, Verified
from atoll.model.difference import Difference
from atoll.model.finding import Finding
from atoll.model.groups import GroupInfo
from atoll.model.image import Image
from atoll.model.network import Network, NetworkInfo
from atoll.model.operation import Operation, Progress
from atoll.model.requests import (
    BuildRequest,
    CaptureRequest,
    CreateRequest,
    DiskRequest,
    ImpairRequest,
    ImportRequest,
    NetworkRequest,
    NicRequest,
    NicSetRequest,
    PullRequest,
    SetRequest,
    ShareRequest,
)
from atoll.model.snapshot import HistoryNode, Snapshot
from atoll.model.spec import DiskSpec, NicSpec, PortSpec
from atoll.model.vm import (
    Change,
    Event,
    ExecRequest,
    ExecResult,
    HostMemory,
    PoolInfo,
    ShareInfo,
    Stats,
    Stopped,
    Vm,
    VmInfo,
)
from atoll.platform.copies import AsyncCopies

Report = Callable[[Progress], None]
BundleFile = str | PathLike[str] | BinaryIO
ByteSink = Callable[[bytes], None]
Drain = Callable[[], Awaitable[None]]


class Terminal(Protocol):
    """A two-way byte stream to a terminal in the guest, or to its serial line."""

    async def read(self) -> bytes:
        """The next bytes, or `b""` when the other side has ended it."""

    async def write(self, data: bytes) -> None: ...

    async def resize(self, *, rows: int, columns: int) -> None:
        """Tell the other side its size; nothing happens on a serial line."""

    async def close(self) -> None:
        """Detach. A shell gets a hang-up; a serial line goes on."""


class Connection(Protocol):
    """A two-way byte stream to something of a VM's."""

    async def read(self) -> bytes:
        """The next bytes, or `b""` when the other side has ended."""

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> None:
        """Nothing more will be written; what comes can still be read."""

    async def close(self) -> None: ...


class AsyncVm(Protocol):
    """A handle to one VM. It holds no resource; it follows the VM by id, so it survives a rename."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...

    async def info(self) -> VmInfo:
        """The record and the phase, observed now."""

    async def start(self, *, wait: bool = False, timeout: float | None = None) -> None:
        """Start it, or let a suspended one go on; with `wait` until it is ready. Fine if it runs."""

    async def stop(self, *, force: bool = False, timeout: float = 60.0) -> None:
        """Ask the agent, then the power button; force it when `timeout` seconds have gone. Fine if it is stopped."""

    async def restart(self, *, force: bool = False, timeout: float = 60.0) -> None:
        """Stop it as `stop` does, and start it again."""

    async def pause(self) -> None:
        """Halt its processors; its memory stays where it is."""

    async def resume(self) -> None:
        """Let a paused or suspended VM go on."""

    async def suspend(self, *, report: Report | None = None) -> None:
        """Write its memory to the disk and end its process; `resume` and `start` go on from there."""

    async def rm(self, *, force: bool = False) -> int:
        """Remove it with its disks and snapshots; a running one only with `force`. Returns how many snapshots went."""

    async def rename(self, name: str) -> None:
        """Give it another name. Its id, and what it calls itself, stay."""

    async def set(self, request: SetRequest) -> list[Change]:
        """Change its settings: at once where that can be, else at its next start. Each change says which."""

    async def wait(
        self,
        condition: Literal["ready", "stopped"] | None = None,
        *,
        text: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """Until it is ready, stopped, or has written `text` (a regular expression) on its serial line.

        Returns what was matched. Raises `TimedOut`, or `WrongState` when it ends first.
        """

    async def exec(
        self,
        command: Sequence[str] | ExecRequest,
        *,
        stdin: bytes | AsyncIterator[bytes] | None = None,
        on_stdout: ByteSink | None = None,
        on_stderr: ByteSink | None = None,
    ) -> ExecResult:
        """Run a command in the guest. With sinks the output goes there as it comes, and isn't in the result.

        Raises `TimedOut` after the request's timeout (the command is killed), `GuestFailed` without an agent.
        """

    async def shell(self, command: Sequence[str] = (), *, user: str | None = None) -> Terminal:
        """A terminal with a login shell, or `command`, in it."""

    async def console(self) -> Terminal:
        """The guest's serial line."""

    async def connect(self, port: int) -> Connection:
        """A TCP connection to a port of the guest, published or not.

        Raises `WrongState` unless it runs, `Unsupported` without a network that leads to it, `NetworkFailed`.
        """

    async def vnc(self) -> Connection:
        """Its display, as VNC viewers speak it (RFB). Raises `Unsupported` without one."""

    async def copy_to(self, source: Path, destination: str, *, report: Report | None = None) -> None:
        """A file or folder into the guest, modes kept; as `cp -a`: into a folder that exists, else under that name."""

    async def copy_from(self, source: str, destination: Path, *, report: Report | None = None) -> None:
        """A file or folder out of the guest, as `copy_to` brings it in."""

    def logs(
        self, *, follow: bool = False, tail: int | None = None, source: Literal["serial", "qemu", "events"] = "serial"
    ) -> AsyncIterator[bytes]:
        """What it wrote, oldest first; with `follow` until it stops."""

    async def screenshot(self) -> bytes:
        """A PNG of its display."""

    async def type(self, text: str) -> None:
        """Type text on its keyboard (US layout)."""

    async def key(self, *keys: str) -> None:
        """Press keys one after another; `ctrl-alt-delete` is a chord. Names are QEMU's QKeyCode."""

    async def ports(self) -> list[PortSpec]:
        """The guest's ports that are published on this computer."""

    async def publish(self, port: PortSpec) -> PortSpec:
        """Publish a port of the guest's; at once if it runs."""

    async def unpublish(self, host_port: int, *, protocol: Literal["tcp", "udp"] = "tcp") -> None:
        """Publish it no longer."""

    async def stats(self) -> Stats:
        """What it uses of processors, memory, disks and networks; counters since its start."""

    async def disks(self) -> list[DiskSpec]:
        """Its disks, the one that it boots from first."""

    async def disk_add(self, request: DiskRequest) -> tuple[DiskSpec, Change]:
        """Give it another disk, at once where that can be."""

    async def disk_rm(self, name: str) -> Change:
        """Take a disk away, with what is on it."""

    async def disk_resize(self, name: str, size: str | int) -> Change:
        """Let a disk grow; it can't shrink."""

    async def shares(self) -> list[ShareInfo]:
        """The folders of this computer that it sees."""

    async def share_add(self, request: ShareRequest) -> ShareInfo:
        """Share a folder of the host's, at once if it runs; one that is shared already is mounted anew if need be."""

    async def share_rm(self, guest_path: str) -> Change:
        """Share a folder no longer; the guest's mount of it goes, too."""

    async def net_attach(self, request: NicRequest | str) -> tuple[NicSpec, Change]:
        """A card on a network, at once where it can be; a name alone is a network's."""

    async def net_set(self, request: NicSetRequest) -> list[Change]:
        """Other security groups, or another limit, for a card on a network; at once."""

    async def net_detach(self, network: str) -> Change:
        """Take the card on a network away, at once where the guest lets go of it."""

    async def net_impair(self, request: ImpairRequest) -> None:
        """Let its cable on a network lose, delay or double packets, or not reach others; `ImpairRequest()` mends it."""

    def net_capture(
        self, request: CaptureRequest | None = None, *, on_lost: Callable[[int], None] | None = None
    ) -> AsyncIterator[bytes]:
        """What passes through a card from now on, as a pcap file: its header, then each frame as one item.

        Frames that come faster than they are taken are lost here, not to the guest; `on_lost` is told how many.
        """

    async def snapshot(
        self,
        name: str | None = None,
        *,
        message: str = "",
        disk_only: bool = False,
        quiesce: bool = False,
        report: Report | None = None,
    ) -> Snapshot:
        """Keep this instant: disks, machine, and the memory of a VM that runs; it halts for some milliseconds.

        `quiesce` freezes the guest's file systems for one that is `disk_only`. Without a name it is `snap-1` ….
        """

    async def history(self) -> list[HistoryNode]:
        """Its snapshots, oldest first; each names its parent."""

    async def restore(
        self, snapshot: str, *, keep: bool = False, disk_only: bool = False, report: Report | None = None
    ) -> None:
        """Make it what it was. One with memory goes on from there; else, and with `disk_only`, a running VM is booted
        anew.

        The present is lost, unless `keep` takes a snapshot of it first.
        """

    async def forget(self, snapshot: str) -> None:
        """Take a snapshot out of the history. What stands on it keeps its data."""

    async def diff(self, snapshot: str, *, report: Report | None = None) -> Difference:
        """What it has otherwise now than in one of its snapshots: settings, files, blocks."""

    async def fork(self, count: int = 1, *, name: str | None = None, report: Report | None = None) -> "AsyncCopies":
        """Running copies of this instant, their memory shared until it is written; this one runs on.

        `{n}` in the name is the copy's number. Fine for a VM that is a copy itself. The list is a context, too, which
        removes them at its end: `async with await vm.fork(10) as forks`.
        """

    async def clone(self, name: str | None = None, *, full: bool = False, report: Report | None = None) -> "AsyncVm":
        """A stopped VM with this one's disks as they are now; with `full` it shares nothing with it."""

    async def backup(
        self, to: str | Path, *, message: str = "", quiesce: bool = False, report: Report | None = None
    ) -> Backup:
        """Copy what the folder `to` hasn't got of its disks as they are now; whatever it does, it goes on.

        `quiesce` freezes the guest's file systems for that moment.
        """

    async def export(
        self,
        path: BundleFile,
        *,
        snapshot: str | None = None,
        base: str | None = None,
        disk_only: bool = False,
        report: Report | None = None,
    ) -> None:
        """Write a bundle of its present, or of a snapshot with its memory. See `host.export`."""


class AsyncImages(Protocol):
    """The images of a host."""

    async def ls(self) -> list[Image]:
        """Those that are here."""

    async def show(self, reference: str) -> Image:
        """One, by a name or its id."""

    async def build(self, request: BuildRequest | str, *, report: Report | None = None) -> Image:
        """Make one from packages. Fine if it is here already."""

    async def pull(self, request: PullRequest | str, *, report: Report | None = None) -> Image:
        """Download a published one, and verify it."""

    async def import_file(self, request: ImportRequest, *, report: Report | None = None) -> Image:
        """Make one of a disk, a CD or a kernel that is a file of this computer."""

    async def create(self, source: str, name: str, *, report: Report | None = None) -> Image:
        """Name a VM's present (`web`) or a snapshot (`web@clean`, or its id), so that VMs can be made from it."""

    async def tag(self, reference: str, name: str) -> Image:
        """Give it another name beside those that it has."""

    async def rm(self, reference: str, *, force: bool = False) -> None:
        """Take a name away, and the image with its last name. VMs made from it keep their layers."""

    async def prune(self, *, every: bool = False, dry_run: bool = False) -> list[tuple[str, int]]:
        """Remove layers and files that no image and no VM needs; with `every` also images that no VM came from.

        Returns what was (or would be) removed, with the bytes it frees.
        """

    async def catalogue(self) -> list[tuple[str, str]]:
        """Names that `build` and `pull` know, with a line about each."""


class AsyncOperations(Protocol):
    """The journal of what was done: an operation is one verb, with its steps."""

    async def ls(self, *, unfinished: bool = False) -> list[Operation]:
        """The journal, newest first; with `unfinished` what runs or is stuck."""

    async def show(self, reference: str) -> Operation:
        """One, with its steps."""

    async def cancel(self, reference: str) -> Operation:
        """Undo what runs or is stuck. Past its point of no return an operation can only be retried."""

    async def retry(self, reference: str) -> Operation:
        """Go on with one that is stuck, where it stopped."""


class AsyncPools(Protocol):
    """Copies of snapshots that are started already and stand still: `take` lets one go on, in some milliseconds."""

    async def ls(self) -> list[PoolInfo]:
        """Those in which copies wait."""

    async def fill(self, snapshot: str, ready: int, *, report: Report | None = None) -> int:
        """Start copies of a snapshot with memory (`web@clean`) until `ready` wait; returns how many were started."""

    async def take(self, snapshot: str, name: str) -> AsyncVm:
        """Let one go on, under this name. Raises `NotFound` when none waits."""

    async def rm(self, snapshot: str) -> int:
        """Remove those that wait; returns how many there were."""


class AsyncGroups(Protocol):
    """Security groups: rules, such as `allow in tcp 80 from any`, for cards on networks that VMs share."""

    async def ls(self) -> list[GroupInfo]:
        """All of them, with the cards that have them."""

    async def show(self, name: str) -> GroupInfo:
        """One of them."""

    async def create(self, name: str, rules: Sequence[str] = ()) -> GroupInfo:
        """A new one. What no rule allows can't reach the cards that have it."""

    async def set(self, name: str, rules: Sequence[str]) -> GroupInfo:
        """Other rules in place of those that it has; they hold at once for machines that run."""

    async def rm(self, name: str) -> None:
        """Raises `WrongState` while cards have it, or rules of others mean it."""


class AsyncNetworks(Protocol):
    """Networks that VMs share. They come up when a VM on them starts."""

    @property
    def groups(self) -> AsyncGroups: ...

    async def ls(self) -> list[NetworkInfo]:
        """All of them, with the machines on each."""

    async def show(self, reference: str) -> NetworkInfo:
        """One of them, by its name or id."""

    async def create(self, request: NetworkRequest | str) -> Network:
        """A new one; what isn't said is chosen."""

    async def exec(self, reference: str, command: Sequence[str], *, stdin: bytes | None = None) -> ExecResult:
        """Run a program of this computer in the network, which comes up for that: it reaches VMs by their names."""

    async def command_line(self, reference: str, command: Sequence[str]) -> list[str]:
        """What runs it there, for who wants to start it himself."""

    async def rm(self, reference: str, *, force: bool = False) -> None:
        """One that VMs have cards on only with `force`, which takes those away."""


class AsyncBackups(Protocol):
    """Folders of backups. A backup is named by its id or the beginning of that, or by its VM, whose newest it is."""

    async def ls(self, folder: str | Path, vm: str | None = None) -> list[Backup]:
        """Those that can be read, oldest first."""

    async def unreadable(self, folder: str | Path) -> list[str]:
        """A sentence about each backup whose manifest can't be read."""

    async def show(self, folder: str | Path, backup: str | None = None) -> Backup:
        """One; without a name the newest of the only VM that the folder has backups of."""

    async def verify(self, folder: str | Path, backup: str | None = None, *, report: Report | None = None) -> Verified:
        """Read every file that the backups, or one, need, and tell which are damaged."""

    async def prune(self, folder: str | Path, vm: str, keep: Keep, *, dry_run: bool = False) -> Pruned:
        """Remove the backups of a VM that the policy doesn't keep, and the files that no backup needs."""

    async def restore(
        self,
        folder: str | Path,
        backup: str | None = None,
        name: str | None = None,
        *,
        report: Report | None = None,
    ) -> AsyncVm:
        """A new, stopped VM; named as it was, unless `name` says otherwise. All is verified while it is copied."""


class AsyncHost(Protocol):
    """A computer that runs VMs."""

    @property
    def images(self) -> AsyncImages: ...
    @property
    def operations(self) -> AsyncOperations: ...
    @property
    def pools(self) -> AsyncPools: ...
    @property
    def networks(self) -> AsyncNetworks: ...
    @property
    def backups(self) -> AsyncBackups: ...

    async def __aenter__(self) -> "AsyncHost": ...
    async def __aexit__(self, *exc: object) -> None: ...

    async def ls(self) -> list[VmInfo]:
        """All VMs, with their phases as they are now."""

    async def memory(self) -> HostMemory:
        """The computer's memory: what running VMs were promised, have taken, share and save."""

    async def get(self, reference: str) -> AsyncVm:
        """The VM with that name, id, or unique prefix of either. Raises `NotFound`."""

    async def create(self, image: str | CreateRequest, *, report: Report | None = None, **options: object) -> AsyncVm:
        """A stopped VM. `options` are the fields of `CreateRequest`: `host.create("tiny", name="v1", cpus=2)`."""

    async def run(
        self,
        image: str | CreateRequest,
        *,
        report: Report | None = None,
        timeout: float | None = None,
        **options: object,
    ) -> AsyncVm:
        """Create, start, and wait until it is ready (it runs, where there is no agent)."""

    async def clone(
        self, source: str, name: str | None = None, *, full: bool = False, report: Report | None = None
    ) -> AsyncVm:
        """A stopped VM with the disks of a VM (`web`) or of a snapshot (`web@clean`, or its id)."""

    async def fork(
        self, source: str, count: int = 1, *, name: str | None = None, report: Report | None = None
    ) -> AsyncCopies:
        """Running copies of a VM (`web`), or of a snapshot with memory (`web@clean`, or its id)."""

    async def stop_all(
        self,
        *,
        timeout: float = 60.0,
        suspend: bool = False,
        for_shutdown: bool = False,
        report: Report | None = None,
    ) -> list[Stopped]:
        """Stop every VM that runs within `timeout` seconds, the highest boot order first; returns what became of each.

        `suspend` keeps their memory on the disk where there is time. `for_shutdown`: those that are to be restarted
        return when the computer starts again.
        """

    async def prune(self, *, every: bool = False, dry_run: bool = False) -> list[tuple[str, int]]:
        """Remove what nothing needs: layers, files, memory, unfinished folders, and what can be made again.

        With `every` also images that no VM or snapshot came from, and downloads that are whole. Returns what was (or
        would be) removed, with the bytes that it frees.
        """

    async def fsck(self, *, repair: bool = False, quick: bool = False, report: Report | None = None) -> list[Finding]:
        """What is wrong with layers, files and records, the worst first. Disks of running VMs aren't read.

        `repair` mends what can be mended without loss. `quick` reads no content.
        """

    async def diff(self, old: str, new: str, *, report: Report | None = None) -> Difference:
        """What differs between two VMs (`web`) or snapshots (`web@clean`, or its id): settings, files, blocks."""

    async def export(
        self,
        source: str,
        path: BundleFile,
        *,
        base: str | None = None,
        disk_only: bool = False,
        report: Report | None = None,
    ) -> None:
        """Write a VM (`web`) as it is now, or a snapshot (`web@clean`) with its memory, into one file.

        `path` may be a binary file that is open, such as a pipe. What the `base` has (`web@older`, or an image) is
        left out: it has to be where the bundle is imported.
        """

    async def import_bundle(
        self, path: BundleFile, name: str | None = None, *, report: Report | None = None
    ) -> AsyncVm:
        """A stopped VM of a bundle, with what was exported as a snapshot in its history.

        Raises `ImageRefused` for a bundle that is damaged or altered, `NotFound` when its base isn't here,
        `AlreadyExists` when its name is taken; nothing is kept then.
        """

    def events(self, *, follow: bool = True, after: int | None = None) -> AsyncIterator[Event]:
        """What happened, and with `follow` what happens; `after` is the last event that is known already."""

    def audit(self, *, follow: bool = False, tail: int | None = None) -> AsyncIterator[AuditEntry]:
        """Who asked its agent for changes, and who was refused, oldest first; with `follow` on and on."""

    def notices(self) -> list[str]:
        """What recovery did to operations that a killed process had left, told once."""


__all__ = [
    "AsyncBackups", "AsyncGroups", "AsyncHost", "AsyncImages", "AsyncNetworks", "AsyncOperations", "AsyncPools",
    "AsyncVm", "Terminal",
    "Vm",
]  # fmt: skip
