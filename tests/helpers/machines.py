"""VMs for tests, as prose: `vm = await factory.run("tiny")`, `assert await vm.read("/x") == "1"`."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Self

from atoll.errors import AtollError
from atoll.layout import Layout
from atoll.model.state import Phase
from atoll.model.vm import Vm
from atoll.platform.local import LocalHost, LocalVm
from tests.helpers.images import adopt_cached

BOOT_TIME = 120.0
"""Seconds for a guest on a busy machine."""


class Machine(LocalVm):
    """A VM with what tests say often."""

    async def sh(self, script: str) -> str:
        """Run a shell line in the guest; its output, without the last newline. Fails when it fails."""
        result = await self.exec(["sh", "-c", script])
        assert result.exit_code == 0, f"{script}: exit {result.exit_code}: {result.stderr.decode(errors='replace')}"
        return result.text

    async def read(self, path: str) -> str:
        return await self.sh(f"cat {path}")

    async def write(self, path: str, text: str) -> None:
        result = await self.exec(["sh", "-c", 'cat > "$0"; sync', path], stdin=text.encode())
        assert result.exit_code == 0, result.stderr

    async def reported(self, event: str, *, seconds: float = 60) -> None:
        """Until QEMU's own log of events has this one."""
        seen = b""
        async with asyncio.timeout(seconds), contextlib.aclosing(self.logs(follow=True, source="events")) as chunks:
            async for chunk in chunks:
                seen += chunk
                if f'"{event}"'.encode() in seen:
                    return
        raise AssertionError(f"QEMU ended and never reported {event}")

    async def phase(self) -> Phase:
        return (await self.info()).phase

    @property
    def record(self) -> Vm:
        return self._record()

    @property
    def pid(self) -> int:
        run = self.record.run
        assert run is not None
        return run.pid


class Factory:
    """Makes VMs in one home and removes them at the end."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.host = LocalHost(layout)
        self._adopted: set[str] = set()

    async def __aenter__(self) -> Self:
        await self.host.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        with contextlib.suppress(AtollError):
            for info in await self.host.ls():
                with contextlib.suppress(AtollError):
                    await (await self.host.get(info.vm.id)).rm(force=True)
            for each in await self.host.networks.ls():
                await self.host.networks.rm(each.network.id, force=True)
        await self.host.__aexit__(*exc)

    async def image(self, recipe: str) -> str:
        if recipe not in self._adopted:
            await adopt_cached(recipe, self.layout)
            self._adopted.add(recipe)
        return recipe.replace("@", "-")

    async def create(self, recipe: str, **options: Any) -> Machine:
        vm = await self.host.create(await self.image(recipe), **options)
        return self.machine(vm)

    async def run(self, recipe: str, **options: Any) -> Machine:
        vm = await self.create(recipe, **options)
        await vm.start(wait=True, timeout=BOOT_TIME)
        return vm

    def machine(self, vm: LocalVm) -> Machine:
        return Machine(self.host._services, vm._record())

    @property
    def folder(self) -> Path:
        return self.layout.data.parent
