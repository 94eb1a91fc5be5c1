"""The façade: what a host and a VM can do, the same for this process, a socket or another machine.

`platform/local.py` does it in this process. `platform/blocking.py` has the same names without `await`.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from atoll.model.audit import AuditEntry
from atoll.model.difference import Difference
from atoll.model.finding import Finding
from atoll.model.requests import CreateRequest
from atoll.model.vm import Event, HostMemory, Stopped, Vm, VmInfo
from atoll.platform.api_parts import AsyncBackups, AsyncGroups, AsyncImages, AsyncNetworks, AsyncOperations, AsyncPools
from atoll.platform.api_vm import AsyncVm, BundleFile, ByteSink, Connection, Drain, Report, Terminal
from atoll.platform.copies import AsyncCopies

__all__ = [
    "AsyncBackups",
    "AsyncGroups",
    "AsyncHost",
    "AsyncImages",
    "AsyncNetworks",
    "AsyncOperations",
    "AsyncPools",
    "AsyncVm",
    "BundleFile",
    "ByteSink",
    "Connection",
    "Drain",
    "Report",
    "Terminal",
]


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
