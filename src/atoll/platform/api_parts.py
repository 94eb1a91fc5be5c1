"""What hangs off a host in the façade (`platform/api.py`): its images, operations, pools, networks, backups."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from atoll.model.backup import Backup, Keep, Pruned, Verified
from atoll.model.groups import GroupInfo
from atoll.model.image import Image
from atoll.model.network import Network, NetworkInfo
from atoll.model.operation import Operation
from atoll.model.requests import BuildRequest, ImportRequest, NetworkRequest, PullRequest
from atoll.model.vm import ExecResult, PoolInfo
from atoll.platform.api_vm import AsyncVm, Report


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
