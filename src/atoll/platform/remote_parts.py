"""What hangs off an agent's host, over HTTP: its images, operations, pools, networks, backups."""

from collections.abc import Sequence

from atoll.errors import Unsupported
from atoll.model.image import Image
from atoll.model.requests import ImportRequest
from atoll.platform import remote_transfers
from atoll.platform.api import (
    AsyncBackups,
    AsyncGroups,
    AsyncImages,
    AsyncNetworks,
    AsyncOperations,
    AsyncPools,
    Report,
)
from atoll.platform.remote_vm import Part, there


class RemoteImages(Part):
    """The images of an agent's host."""

    ls = there(AsyncImages.ls)
    show = there(AsyncImages.show)
    create = there(AsyncImages.create)
    rm = there(AsyncImages.rm)
    catalogue = there(AsyncImages.catalogue)
    build = there(AsyncImages.build)
    pull = there(AsyncImages.pull)

    async def import_file(self, request: ImportRequest, *, report: Report | None = None) -> Image:
        return await remote_transfers.import_image(self._wire, request, report=report)

    tag = there(AsyncImages.tag)
    prune = there(AsyncImages.prune)


class RemoteOperations(Part):
    """Its journal."""

    ls = there(AsyncOperations.ls)
    show = there(AsyncOperations.show)
    cancel = there(AsyncOperations.cancel)
    retry = there(AsyncOperations.retry)


class RemotePools(Part):
    """Its pools."""

    ls = there(AsyncPools.ls)
    fill = there(AsyncPools.fill)
    take = there(AsyncPools.take)
    rm = there(AsyncPools.rm)


class RemoteGroups(Part):
    """Its security groups."""

    ls = there(AsyncGroups.ls)
    create = there(AsyncGroups.create)
    show = there(AsyncGroups.show)
    set = there(AsyncGroups.set)
    rm = there(AsyncGroups.rm)


class RemoteNetworks(Part):
    """Its networks."""

    ls = there(AsyncNetworks.ls)
    create = there(AsyncNetworks.create)
    show = there(AsyncNetworks.show)
    rm = there(AsyncNetworks.rm)
    exec = there(AsyncNetworks.exec)

    @property
    def groups(self) -> RemoteGroups:
        return RemoteGroups(self._wire)

    async def command_line(self, reference: str, command: Sequence[str]) -> list[str]:
        if self._wire.place.socket is not None:
            from atoll.platform.local import LocalHost

            async with LocalHost() as host:
                return await host.networks.command_line(reference, command)
        raise Unsupported(
            "a program can be started in a network only on the computer that has it",
            next_step="Use `exec`, which runs it there.",
        )


class RemoteBackups(Part):
    """Folders of backups, on the agent's host."""

    ls = there(AsyncBackups.ls)
    unreadable = there(AsyncBackups.unreadable)
    show = there(AsyncBackups.show)
    verify = there(AsyncBackups.verify)
    prune = there(AsyncBackups.prune)
    restore = there(AsyncBackups.restore)
