"""The façade without `await`: the same names; how calls are made is in `blocking_calls.py`.

A host may be used from several threads at once. Callbacks (`report`, `on_stdout`) are called in the loop's thread.
"""

import functools
from pathlib import Path
from typing import Literal, Self

from atoll.model.requests import CreateRequest
from atoll.platform.api import (
    AsyncBackups,
    AsyncGroups,
    AsyncHost,
    AsyncImages,
    AsyncNetworks,
    AsyncOperations,
    AsyncPools,
    BundleFile,
    Report,
)
from atoll.platform.blocking_calls import Calls, Handle, blocking, plain_iterator
from atoll.platform.blocking_vm import BlockingConnection, BlockingTerminal, Vm
from atoll.platform.copies import Copies


class Images(Handle[AsyncImages]):
    """The images of a host; see `platform/api.py`."""

    ls = blocking(AsyncImages.ls)
    show = blocking(AsyncImages.show)
    build = blocking(AsyncImages.build)
    pull = blocking(AsyncImages.pull)
    import_file = blocking(AsyncImages.import_file)
    create = blocking(AsyncImages.create)
    tag = blocking(AsyncImages.tag)
    rm = blocking(AsyncImages.rm)
    prune = blocking(AsyncImages.prune)
    catalogue = blocking(AsyncImages.catalogue)


class Operations(Handle[AsyncOperations]):
    """The journal of a host; see `platform/api.py`."""

    ls = blocking(AsyncOperations.ls)
    show = blocking(AsyncOperations.show)
    cancel = blocking(AsyncOperations.cancel)
    retry = blocking(AsyncOperations.retry)


class Pools(Handle[AsyncPools]):
    """Copies of snapshots that wait; see `platform/api.py`."""

    ls = blocking(AsyncPools.ls)
    fill = blocking(AsyncPools.fill)
    rm = blocking(AsyncPools.rm)

    def take(self, snapshot: str, name: str) -> Vm:
        """Let one go on, under this name. Raises `NotFound` when none waits."""
        return Vm(self._calls.wait_for(lambda: self._inner.take(snapshot, name)), self._calls)


class Groups(Handle[AsyncGroups]):
    """Security groups; see `platform/api.py`."""

    ls = blocking(AsyncGroups.ls)
    show = blocking(AsyncGroups.show)
    create = blocking(AsyncGroups.create)
    set = blocking(AsyncGroups.set)
    rm = blocking(AsyncGroups.rm)


class Networks(Handle[AsyncNetworks]):
    """The networks of a host; see `platform/api.py`."""

    @property
    def groups(self) -> Groups:
        return Groups(self._inner.groups, self._calls)

    ls = blocking(AsyncNetworks.ls)
    show = blocking(AsyncNetworks.show)
    create = blocking(AsyncNetworks.create)
    exec = blocking(AsyncNetworks.exec)
    command_line = blocking(AsyncNetworks.command_line)
    rm = blocking(AsyncNetworks.rm)


class Backups(Handle[AsyncBackups]):
    """Folders of backups; see `platform/api.py`."""

    ls = blocking(AsyncBackups.ls)
    unreadable = blocking(AsyncBackups.unreadable)
    show = blocking(AsyncBackups.show)
    verify = blocking(AsyncBackups.verify)
    prune = blocking(AsyncBackups.prune)

    def restore(
        self,
        folder: str | Path,
        backup: str | None = None,
        name: str | None = None,
        *,
        report: Report | None = None,
    ) -> Vm:
        """A new, stopped VM; named as it was, unless `name` says otherwise. All is verified while it is copied."""
        restore = functools.partial(self._inner.restore, folder, backup, name, report=report)
        return Vm(self._calls.wait_for(restore), self._calls)


class Host(Handle[AsyncHost]):
    """A computer that runs VMs; see `platform/api.py`. It is open inside its `with` block."""

    def __init__(self, inner: AsyncHost) -> None:
        super().__init__(inner, Calls())

    @property
    def images(self) -> Images:
        return Images(self._inner.images, self._calls)

    @property
    def operations(self) -> Operations:
        return Operations(self._inner.operations, self._calls)

    @property
    def pools(self) -> Pools:
        return Pools(self._inner.pools, self._calls)

    @property
    def networks(self) -> Networks:
        return Networks(self._inner.networks, self._calls)

    @property
    def backups(self) -> Backups:
        return Backups(self._inner.backups, self._calls)

    def __enter__(self) -> Self:
        self._calls.open()
        try:
            self._calls.wait_for(self._inner.__aenter__)
        except BaseException:
            self._calls.close()
            raise
        return self

    def __exit__(self, *exc: object) -> Literal[False]:
        try:
            self._calls.wait_for(lambda: self._inner.__aexit__(*exc))
        finally:
            self._calls.close()
        return False

    ls = blocking(AsyncHost.ls)
    stop_all = blocking(AsyncHost.stop_all)
    memory = blocking(AsyncHost.memory)
    prune = blocking(AsyncHost.prune)
    fsck = blocking(AsyncHost.fsck)
    diff = blocking(AsyncHost.diff)
    export = blocking(AsyncHost.export)
    events = plain_iterator(AsyncHost.events)
    audit = plain_iterator(AsyncHost.audit)

    def get(self, reference: str) -> Vm:
        """The VM with that name, id, or unique prefix of either. Raises `NotFound`."""
        return Vm(self._calls.wait_for(lambda: self._inner.get(reference)), self._calls)

    def create(self, image: str | CreateRequest, *, report: Report | None = None, **options: object) -> Vm:
        """A stopped VM. `options` are the fields of `CreateRequest`: `host.create("tiny", name="v1", cpus=2)`."""
        create = functools.partial(self._inner.create, image, report=report, **options)
        return Vm(self._calls.wait_for(create), self._calls)

    def run(
        self,
        image: str | CreateRequest,
        *,
        report: Report | None = None,
        timeout: float | None = None,
        **options: object,
    ) -> Vm:
        """Create, start, and wait (at most `timeout` seconds) until it is ready (it runs, where there is no agent)."""
        run = functools.partial(self._inner.run, image, report=report, timeout=timeout, **options)
        return Vm(self._calls.wait_for(run), self._calls)

    def clone(self, source: str, name: str | None = None, *, full: bool = False, report: Report | None = None) -> Vm:
        """A stopped VM with the disks of a VM (`web`) or of a snapshot (`web@clean`, or its id)."""
        clone = functools.partial(self._inner.clone, source, name, full=full, report=report)
        return Vm(self._calls.wait_for(clone), self._calls)

    def fork(self, source: str, count: int = 1, *, name: str | None = None, report: Report | None = None) -> Copies:
        """Running copies of a VM (`web`), or of a snapshot with memory (`web@clean`, or its id)."""
        made = self._calls.wait_for(lambda: self._inner.fork(source, count, name=name, report=report))
        return Copies(Vm(vm, self._calls) for vm in made)

    def import_bundle(self, path: BundleFile, name: str | None = None, *, report: Report | None = None) -> Vm:
        """A stopped VM of a bundle, with what was exported as a snapshot in its history."""
        made = self._calls.wait_for(lambda: self._inner.import_bundle(path, name, report=report))
        return Vm(made, self._calls)

    def notices(self) -> list[str]:
        """What recovery did to operations that a killed process had left, told once."""
        return self._inner.notices()


__all__ = [
    "Backups",
    "BlockingConnection",
    "BlockingTerminal",
    "Groups",
    "Host",
    "Images",
    "Networks",
    "Operations",
    "Pools",
    "Vm",
]
