"""The images, the journal and the pools of this machine."""

from atoll.errors import InvalidInput, NotFound, WrongState
from atoll.model.image import Image
from atoll.model.operation import Operation
from atoll.model.requests import BuildRequest, ImportRequest, PullRequest
from atoll.model.snapshot import Snapshot
from atoll.model.vm import PoolInfo
from atoll.operations.services import Services
from atoll.platform.api import AsyncVm, Report


class LocalImages:
    """The images of this machine."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def ls(self) -> list[Image]:
        return self._services.records.images()

    async def show(self, reference: str) -> Image:
        from atoll.operations.create import find_image

        return find_image(reference, self._services.records.images())

    async def build(self, request: BuildRequest | str, *, report: Report | None = None) -> Image:
        from atoll.operations.images import make_image

        wanted = BuildRequest(recipe=request) if isinstance(request, str) else request
        return await make_image(wanted, services=self._services, report=report)

    async def pull(self, request: PullRequest | str, *, report: Report | None = None) -> Image:
        from atoll.operations.images import make_image

        wanted = PullRequest(source=request) if isinstance(request, str) else request
        return await make_image(wanted, services=self._services, report=report)

    async def import_file(self, request: ImportRequest, *, report: Report | None = None) -> Image:
        from atoll.operations.images import make_image

        return await make_image(request, services=self._services, report=report)

    async def create(self, source: str, name: str, *, report: Report | None = None) -> Image:
        from atoll.operations.clone import find_source
        from atoll.operations.image_create import create_image

        return await create_image(find_source(source, self._services), name, services=self._services, report=report)

    async def tag(self, reference: str, name: str) -> Image:
        from atoll.operations.images import tag

        return await tag(reference, name, services=self._services)

    async def rm(self, reference: str, *, force: bool = False) -> None:
        from atoll.operations.images import remove

        await remove(reference, services=self._services, force=force)

    async def prune(self, *, every: bool = False, dry_run: bool = False) -> list[tuple[str, int]]:
        from atoll.operations.images import prune

        return await prune(services=self._services, every=every, dry_run=dry_run)

    async def catalogue(self) -> list[tuple[str, str]]:
        from atoll.images.catalogue import described
        from atoll.images.recipes import RECIPES

        return [*((name, f"build: {line}") for name, line in RECIPES.items()), *described(self._services.layout)]


class LocalPools:
    """The pools of this machine."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def _node(self, reference: str) -> Snapshot:
        from atoll.operations.clone import find_source

        found = find_source(reference, self._services)
        if not isinstance(found, Snapshot):
            raise InvalidInput(f"'{reference}' is a VM", next_step=f"Name a snapshot of it: {reference}@NAME.")
        return found

    async def ls(self) -> list[PoolInfo]:
        from atoll.operations.pool import pools

        return pools(self._services)

    async def fill(self, snapshot: str, ready: int, *, report: Report | None = None) -> int:
        from atoll.operations.pool import fill

        return await fill(self._node(snapshot), ready, services=self._services, report=report)

    async def take(self, snapshot: str, name: str) -> AsyncVm:
        from atoll.operations.pool import take
        from atoll.platform.local_vm import LocalVm

        return LocalVm(self._services, await take(self._node(snapshot), name, services=self._services))

    async def rm(self, snapshot: str) -> int:
        from atoll.operations.pool import empty

        known = next((pool.snapshot_id for pool in await self.ls() if snapshot in (pool.name, pool.snapshot_id)), None)
        return await empty(known or self._node(snapshot).id, services=self._services)


class LocalOperations:
    """The journal of this machine."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def ls(self, *, unfinished: bool = False) -> list[Operation]:
        return self._services.records.operations(unfinished=unfinished)

    async def show(self, reference: str) -> Operation:
        operations = self._services.records.operations(limit=100_000)
        fitting = [operation for operation in operations if reference and operation.id.startswith(reference)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InvalidInput(f"'{reference}' fits {len(fitting)} operations", next_step="Write more of the id.")
        raise NotFound(f"there is no operation '{reference}'", next_step="`atoll operation ls` lists them.")

    async def cancel(self, reference: str) -> Operation:
        from atoll.host import facts
        from atoll.operations.recovery import settle
        from atoll.operations.registry import VERBS

        operation = await self.show(reference)
        if operation.state in ("done", "undone"):
            raise WrongState(f"the operation {reference} has ended", f"it is {operation.state}")
        if operation.state != "stuck" and facts.is_alive(operation.owner):
            self._services.records.request_cancel(operation.id)
            # The owner undoes it under the lock; when the lock is free, it is done.
            async with self._services.lease(operation.subject, what=operation.subject_name):
                return await self.show(operation.id)
        await settle(self._services, VERBS, operation.id)
        return await self.show(operation.id)

    async def retry(self, reference: str) -> Operation:
        from atoll.operations.recovery import settle
        from atoll.operations.registry import VERBS

        operation = await self.show(reference)
        if operation.state in ("done", "undone"):
            raise WrongState(
                f"the operation {reference} has ended", f"it is {operation.state}", "Give its command again."
            )
        await settle(self._services, VERBS, operation.id, forward=True)
        return await self.show(operation.id)
