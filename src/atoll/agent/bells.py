"""The bells of VMs that sleep since nobody used them: whoever calls one of their ports wakes them.

What there is to keep up is in the records, so an agent that was killed is followed by one that does the same.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from atoll.agent.recover import Tell
from atoll.errors import AtollError, NotFound
from atoll.host import facts, sleeping_link, sockets
from atoll.model.spec import NicSpec
from atoll.model.vm import Vm
from atoll.operations import bells
from atoll.operations.services import Services
from atoll.operations.suspend import has_callers
from atoll.operations.wake import wake
from atoll.qemu.devices import network_descriptor

REST = 5.0
"""Seconds after a start that failed in which callers wait: they don't make the computer try again and again."""

CLOSE_TIMEOUT = 45.0
"""Seconds that suspensions and wakes have when the agent ends."""


async def finished(tasks: list[asyncio.Task[None]]) -> None:
    """Let what is at work come to its end: cut off behind its point of no return, an operation would be stuck."""
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT)
        for each in late:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Bell:
    """One VM's: its networks, and the socket at which who starts it gets them."""

    def __init__(self, vm: Vm, kept: bells.Kept, place: Path, bells_of_all: "Bells") -> None:
        self.nics: list[NicSpec] = bells.answering(vm)
        self._vm_id = vm.id
        self._kept = kept
        self._place = place
        self._server = sockets.listen(place)
        self._server.setblocking(False)
        self._all = bells_of_all
        self._listening: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._server, self._hand_over)

    @property
    def is_there(self) -> bool:
        """Whether nobody has taken its networks yet."""
        return self._server.fileno() >= 0

    def listen(self) -> None:
        """Ring once when somebody calls."""
        if not self.is_there or self._listening:
            return
        for nic in self.nics:
            descriptor = self._kept.descriptors[network_descriptor(nic)]
            self._listening.append(descriptor)
            self._loop.add_reader(descriptor, self.ring)

    def ring(self) -> None:
        """Somebody calls."""
        self._deafen()
        for nic in self.nics:
            # Who has asked for its address shall send what it wants before the guest is there to answer.
            address = bells.address_of(nic)
            sleeping_link.announce(self._kept.descriptors[network_descriptor(nic)], mac=nic.mac, address=address)
        self._all.rung(self._vm_id)

    def _deafen(self) -> None:
        for each in self._listening:
            self._loop.remove_reader(each)
        self._listening = []

    def _hand_over(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._server.accept()
            with client:
                self._deafen()
                bells.hand_over(client, self._kept)
        self.close()
        # Who has taken its networks may fail to start it; then it is to have another one.
        self._all.look_at(self._vm_id)

    def close(self) -> None:
        """Its helpers end, and the ports are free."""
        if self.is_there:
            self._deafen()
            self._loop.remove_reader(self._server)
            self._server.close()
            self._place.unlink(missing_ok=True)
            self._kept.close()


class Bells:
    """Those of all VMs."""

    def __init__(self, services: Services, tell: Tell) -> None:
        services.inherits = {}
        self._services = services
        """Those of the agent's verbs: limits hold for what callers wake, too."""
        self._tell = tell
        self._bells: dict[str, Bell] = {}
        self._work: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        """Whose records have changed while they were being looked at."""
        self._resting: dict[str, float] = {}
        """Until when VMs aren't woken that have just failed to."""
        self._said: dict[str, str] = {}
        """What stands in the way of bells that can't be hung up."""

    async def close(self) -> None:
        await finished(list(self._work.values()))
        for bell in self._bells.values():
            bell.close()
        for kept in (self._services.inherits or {}).values():
            kept.close()
        self._services.inherits = None

    def look_at(self, vm_id: str) -> None:
        """See to it that the VM has a bell if it is to have one, and none else."""
        if vm_id in self._work:
            self._again.add(vm_id)
            return
        vm = self._services.records.vm(vm_id)
        if vm_id in self._bells or (vm is not None and vm.sleeps):
            self._begin(vm_id, self._look_at(vm_id))
        else:
            self._said.pop(vm_id, None)

    def try_again(self) -> None:
        """Those that couldn't be hung up."""
        for each in list(self._said):
            self.look_at(each)

    def _begin(self, vm_id: str, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except AtollError as error:
                self._tell(f"Error: {error.text}")
            finally:
                del self._work[vm_id]
            if vm_id in self._again:
                self._again.discard(vm_id)
                self.look_at(vm_id)

        self._work[vm_id] = asyncio.create_task(run())

    async def _look_at(self, vm_id: str) -> None:
        async with self._services.lease(vm_id, what="the VM"):
            vm = self._services.records.vm(vm_id)
            bell, inherited = self._bells.get(vm_id), (self._services.inherits or {}).pop(vm_id, None)
            nics = bells.answering(vm) if vm is not None and vm.sleeps else []
            if bell is not None and bell.is_there and bell.nics == nics:
                return
            if inherited is not None and not nics:
                inherited.close()
            if bell is not None:
                bell.close()
                del self._bells[vm_id]
            if vm is None or not nics:
                self._said.pop(vm_id, None)
                return
            await self._hang_up(vm, inherited)

    async def _hang_up(self, vm: Vm, inherited: bells.Kept | None) -> None:
        try:
            kept = await bells.keep(self._services, vm, inherited)
        except (AtollError, OSError) as error:
            said = error.text if isinstance(error, AtollError) else str(error)
            if self._said.get(vm.id) != said:
                self._said[vm.id] = said
                self._tell(f"Error: while '{vm.name}' sleeps, callers don't reach it: {said}")
                self._services.records.add_event("vm.unreachable", vm_id=vm.id, name=vm.name, data={"error": said})
            return
        self._said.pop(vm.id, None)
        try:
            bell = Bell(vm, kept, self._services.layout.vm(vm.id).socket("bell"), self)
        except BaseException:
            kept.close()
            raise
        self._bells[vm.id] = bell
        rest = self._resting.pop(vm.id, 0.0) - time.monotonic()
        if rest > 0:
            asyncio.get_running_loop().call_later(rest, bell.listen)
        elif has_callers(vm, facts.connected_ports()):
            # They came while it was being suspended.
            bell.ring()
        else:
            bell.listen()

    def rung(self, vm_id: str) -> None:
        if vm_id in self._work:
            # It is being looked at; who calls isn't forgotten by that.
            self._work[vm_id].add_done_callback(lambda _: self.rung(vm_id))
        else:
            self._begin(vm_id, self._wake(vm_id))

    async def _wake(self, vm_id: str) -> None:
        vm = self._services.records.vm(vm_id)
        if vm is None or not vm.sleeps:
            return
        try:
            await wake(vm, services=self._services, by="connection")
        except NotFound:
            return
        except AtollError as error:
            self._resting[vm_id] = time.monotonic() + REST
            self._tell(f"Error: '{vm.name}' was called, and can't be woken: {error.text}")
            data = {"by": "connection", "error": error.text}
            self._services.records.add_event("vm.wake-failed", vm_id=vm_id, name=vm.name, data=data)
            bell = self._bells.get(vm_id)
            if bell is not None and bell.is_there:
                # It didn't come so far that somebody would have taken its networks: callers are told.
                bell.close()
            self._again.add(vm_id)
            return
        self._tell(f"'{vm.name}' was woken by a connection")
