"""What a VM can do: its part of the façade (`platform/api.py`)."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from atoll.model.backup import Backup
from atoll.model.difference import Difference
from atoll.model.operation import Progress
from atoll.model.requests import (
    CaptureRequest,
    DiskRequest,
    ImpairRequest,
    NicRequest,
    NicSetRequest,
    SetRequest,
    ShareRequest,
)
from atoll.model.snapshot import HistoryNode, Snapshot
from atoll.model.spec import DiskSpec, NicSpec, PortSpec
from atoll.model.vm import Change, ExecRequest, ExecResult, ShareInfo, Stats, VmInfo
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
