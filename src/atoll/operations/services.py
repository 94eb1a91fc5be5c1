"""What every operation works with: the paths, the records, and what this host's engine can do."""

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll import layout as layouts
from atoll.errors import NotFound, StorageFailed
from atoll.layout import Layout
from atoll.model import names
from atoll.model.operation import Progress
from atoll.model.vm import Vm
from atoll.operations import expectation
from atoll.store.records import Records
from atoll.store.sqlite import SqliteRecords

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

    from atoll.model.launch import Capabilities
    from atoll.model.pressure import Figures
    from atoll.model.spec import AcceleratorChoice, Arch
    from atoll.operations.bells import Kept
    from atoll.operations.promises import Promises

Report = Callable[[Progress], None]
LOCK_TIMEOUT = 120.0
"""Seconds that an operation waits for another one on the same VM."""


class Services:
    """Opened once by a command or an SDK connection. Heavy parts are imported when they are first used."""

    def __init__(self, layout: Layout | None = None, *, ends_noticed: bool = False) -> None:
        """`ends_noticed`: something else in this process records the ends of QEMUs, so followers of events needn't."""
        self.layout = layout or layouts.find()
        self.ends_noticed = ends_noticed
        self.promises: Promises | None = None
        """The limit of the memory that VMs may be promised, if there is one."""
        self.inherits: dict[str, Kept] | None = None
        """Where somebody listens for who calls VMs that sleep: the networks of those that were just suspended."""
        self.pressure: Figures | None = None
        """What this process knows of the computer's memory, if it watches that: an agent."""
        self.silent: set[str] = set()
        """VMs whose QEMU gave no answer when this process last asked for their phase."""
        self._later: set[asyncio.Task[None]] = set()
        self.bridges_left: set[str] = set()
        """Networks of mode bridge with rules for cables of VMs that have ended by themselves."""

    def later(self, work: "Coroutine[Any, Any, None]") -> None:
        """Do something that nobody has to wait for, and that may be left undone; bounded in time by itself."""
        import asyncio

        task = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def finish(self) -> None:
        """Wait for what was to be done later."""
        import asyncio

        await asyncio.gather(*self._later, return_exceptions=True)

    @cached_property
    def records(self) -> Records:
        return SqliteRecords(self.layout.database, wake=self.layout.wake, reserve=self.layout.reserve)

    def close(self) -> None:
        if "records" in self.__dict__:
            self.records.close()
            del self.__dict__["records"]

    def find_vm(self, reference: str) -> Vm:
        """By name, id, or unique prefix of either. Raises `NotFound`."""
        return self.records.called(reference) or names.find(reference, self.records.vms(), "VM")

    def vm(self, vm_id: str) -> Vm:
        """The record as it is now. Raises `NotFound` when it was removed meanwhile."""
        vm = self.records.vm(vm_id)
        if vm is None:
            raise NotFound(
                f"the VM {vm_id[: names.SHORT_ID]} is gone", "it was removed", "`atoll ls` lists what there is."
            )
        return vm

    @contextlib.asynccontextmanager
    async def lease(self, subject: str, *, what: str, timeout: float = LOCK_TIMEOUT) -> AsyncIterator[None]:
        """Hold the lock of a VM or an image collection. Raises `Busy`."""
        from atoll.host.lease import lease

        async with lease(self.layout.vm_lock(subject), what=what, timeout=timeout):
            expectation.locked(subject)
            yield

    async def capabilities(self, arch: "Arch") -> "Capabilities":
        """What the QEMU for this architecture can do; asked once for each binary, then cached."""
        import msgspec

        from atoll.host import files, process
        from atoll.qemu import probe

        binary = Path(process.find(probe.BINARIES[arch]))
        known = probe.cached(binary, self.layout.capabilities)
        if known is None:
            known = await probe.probe(binary)
            # Where it can't be kept, the next command asks again.
            with contextlib.suppress(StorageFailed):
                files.make_folder(self.layout.capabilities)
                files.write_atomically(self.layout.capabilities / f"{binary.name}.json", msgspec.json.encode(known))
        return known

    async def accelerator(self, choice: "AcceleratorChoice", caps: "Capabilities") -> str:
        """`kvm`, `hvf` or `whpx` where it was proved and fits the guest, else `tcg`. Raises `Unsupported`."""
        from atoll.host import accelerator
        from atoll.qemu import probe

        if choice == "tcg" or (choice == "auto" and caps.arch != probe.host_arch()):
            return "tcg"
        proofs = await accelerator.prove(self.layout, Path(caps.binary))
        return accelerator.choose(choice, proofs).name
