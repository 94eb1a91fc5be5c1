"""How much memory VMs may be promised together, where somebody has set a limit: an agent, for those that it starts."""

import contextlib
from collections.abc import Iterator

from atoll.errors import Busy
from atoll.host import facts
from atoll.model.units import format_size
from atoll.model.vm import Run, Vm


class Promises:
    """A limit, and what was promised to VMs that are being started, whose processes are in no record yet."""

    def __init__(self, *, overcommit: float, reserve: int) -> None:
        """`overcommit` times the memory of the computer, without what is reserved for itself."""
        self._overcommit = overcommit
        self._reserve = reserve
        self._given: dict[str, tuple[int, Run | None]] = {}

    @property
    def most(self) -> int:
        return int(max(0, facts.memory().total - self._reserve) * self._overcommit)

    @contextlib.contextmanager
    def given(self, vm: Vm, memory: int, everyone: list[Vm]) -> Iterator[list[Run]]:
        """Promise it to a VM while it starts, and then for as long as the process lives that is put into the list.

        Raises `Busy`, with the figures.
        """
        self._check(vm, memory, everyone)
        self._given[vm.id] = memory, None
        started: list[Run] = []
        try:
            yield started
        finally:
            del self._given[vm.id]
            if started:
                self._given[vm.id] = memory, started[0]

    def _check(self, vm: Vm, memory: int, everyone: list[Vm]) -> None:
        self._given = {
            vm_id: (size, run)
            for vm_id, (size, run) in self._given.items()
            if vm_id != vm.id and (run is None or facts.is_alive(run))
        }
        others = {each.id: each.spec.memory for each in everyone if each.run is not None and facts.is_alive(each.run)}
        others |= {vm_id: size for vm_id, (size, _) in self._given.items()}
        others.pop(vm.id, None)
        promised = sum(others.values())
        if promised + memory > self.most:
            raise Busy(
                f"{vm.name}: it can't have {format_size(memory)} of memory",
                f"{len(others)} other VMs have been promised {format_size(promised)} of {format_size(self.most)}, "
                f"{self._overcommit:g} × the computer's memory without {format_size(self._reserve)} for itself",
                f"Stop another one, or give it less: `atoll set {vm.name} --memory SIZE`.",
            )
