"""Folders of backups, as this machine reads and writes them."""

from pathlib import Path

from atoll.model.backup import Backup, Keep, Pruned, Verified
from atoll.operations.services import Services
from atoll.platform.api import AsyncBackups, AsyncVm, Report


class LocalBackups:
    """See `platform/api.py` for what each method does."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def ls(self, folder: str | Path, vm: str | None = None) -> list[Backup]:
        from atoll.operations.backup_find import listed

        return listed(folder, vm)

    async def unreadable(self, folder: str | Path) -> list[str]:
        from atoll.operations.backup_find import unreadable

        return unreadable(folder)

    async def show(self, folder: str | Path, backup: str | None = None) -> Backup:
        from atoll.operations.backup_find import find

        return find(folder, backup)

    async def verify(self, folder: str | Path, backup: str | None = None, *, report: Report | None = None) -> Verified:
        from atoll.operations.backup_verify import verify

        return await verify(folder, backup, report=report)

    async def prune(self, folder: str | Path, vm: str, keep: Keep, *, dry_run: bool = False) -> Pruned:
        from atoll.operations.backup_prune import prune

        return await prune(folder, vm, keep, services=self._services, dry_run=dry_run)

    async def restore(
        self, folder: str | Path, backup: str | None = None, name: str | None = None, *, report: Report | None = None
    ) -> AsyncVm:
        from atoll.operations.backup_restore import restore_backup
        from atoll.platform.local_vm import LocalVm

        made = await restore_backup(folder, backup, name, services=self._services, report=report)
        return LocalVm(self._services, made)


_: type[AsyncBackups] = LocalBackups
