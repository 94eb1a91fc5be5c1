"""The networks of this machine, and its security groups."""

from collections.abc import Sequence

from msgspec.structs import replace

from atoll.model.groups import GroupInfo
from atoll.model.network import Network, NetworkInfo
from atoll.model.requests import NetworkRequest
from atoll.model.vm import ExecResult
from atoll.operations.services import Services


class LocalNetworks:
    """The networks of this machine."""

    def __init__(self, services: Services) -> None:
        self._services = services

    @property
    def groups(self) -> "LocalGroups":
        return LocalGroups(self._services)

    async def ls(self) -> list[NetworkInfo]:
        from atoll.operations.networks import list_networks

        return list_networks(self._services)

    async def show(self, reference: str) -> NetworkInfo:
        from atoll.operations.network_troubles import troubles
        from atoll.operations.networks import find_network

        wanted = find_network(self._services, reference)
        found = next(info for info in await self.ls() if info.network.id == wanted.id)
        return replace(found, troubles=await troubles(self._services, wanted))

    async def create(self, request: NetworkRequest | str) -> Network:
        from atoll.operations.network import create

        wanted = NetworkRequest(name=request) if isinstance(request, str) else request
        return await create(wanted, services=self._services)

    async def command_line(self, reference: str, command: Sequence[str]) -> list[str]:
        from atoll.operations.network_exec import command_line
        from atoll.operations.networks import find_network

        return await command_line(find_network(self._services, reference), command, services=self._services)

    async def exec(self, reference: str, command: Sequence[str], *, stdin: bytes | None = None) -> ExecResult:
        from atoll.operations.network_exec import execute
        from atoll.operations.networks import find_network

        return await execute(find_network(self._services, reference), command, services=self._services, stdin=stdin)

    async def rm(self, reference: str, *, force: bool = False) -> None:
        from atoll.operations.network import remove
        from atoll.operations.networks import find_network

        await remove(find_network(self._services, reference), services=self._services, force=force)


class LocalGroups:
    """The security groups of this machine."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def ls(self) -> list[GroupInfo]:
        from atoll.operations.network_groups import list_groups

        return list_groups(self._services)

    async def show(self, name: str) -> GroupInfo:
        from atoll.operations.network_groups import find_group

        wanted = find_group(self._services, name)
        return next(info for info in await self.ls() if info.name == wanted.name)

    async def create(self, name: str, rules: Sequence[str] = ()) -> GroupInfo:
        from atoll.operations.network_groups import create_group

        await create_group(name, rules, services=self._services)
        return await self.show(name)

    async def set(self, name: str, rules: Sequence[str]) -> GroupInfo:
        from atoll.operations.network_groups import set_group

        await set_group(name, rules, services=self._services)
        return await self.show(name)

    async def rm(self, name: str) -> None:
        from atoll.operations.network_groups import remove_group

        await remove_group(name, services=self._services)
