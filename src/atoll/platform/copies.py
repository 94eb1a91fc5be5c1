"""The copies that a fork makes: a list, and a context that removes them at its end."""

import contextlib
from typing import TYPE_CHECKING, Self

from atoll.errors import NotFound

if TYPE_CHECKING:
    from atoll.platform.api import AsyncVm
    from atoll.platform.blocking import Vm


class AsyncCopies(list["AsyncVm"]):
    """`async with await vm.fork(10) as forks:` removes them at the end; without it they stay."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Raises the first error, after all have been tried; those that are gone already are fine."""
        import asyncio

        results = await asyncio.gather(*(vm.rm(force=True) for vm in self), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, NotFound):
                raise result


class Copies(list["Vm"]):
    """`with vm.fork(10) as forks:` removes them at the end; without it they stay."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for vm in self:
            with contextlib.suppress(NotFound):
                vm.rm(force=True)
