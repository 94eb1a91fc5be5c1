"""A stream slot of a VM: three ports, a lock, and the relays in the guest that serve it (see guest_scripts.py)."""

import contextlib
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec

from atoll.errors import GuestFailed
from atoll.host.files import locked
from atoll.layout import VmPaths
from atoll.operations import guest_scripts
from atoll.operations.guest_agent import connect
from atoll.qemu.guest import Agent

SLOTS = 4
SH = "/bin/sh"


class Relay(msgspec.Struct, frozen=True, kw_only=True):
    """The relays of a slot, as the slot's lock file remembers them."""

    qemu: tuple[int, int]
    """The inode and the birth of QEMU's agent socket: another run of QEMU has other ones."""
    pid: int
    mark: str
    uses: int = 0
    """Commands that it has served. Relays without any may have told somebody who has gone that they are ready."""
    last: int | None = None
    """The pid of the last command's shell, to be collected so that the agent forgets it."""
    clean: bool = False
    """The last command was seen to its end, and nothing was left behind it."""


class Slot:
    """A slot that is ours as long as its lock is held."""

    def __init__(self, paths: VmPaths, name: str, number: int) -> None:
        self.number = number
        self._paths = paths
        self._name = name
        self._file = paths.lock(f"stream{number}")

    @property
    def folder(self) -> str:
        return guest_scripts.relay_folder(self.number)

    def port(self, kind: str) -> socket.socket:
        """A connected socket to the slot's port `in`, `out` or `err`."""
        return connect(self._paths, self._name, f"{kind}{self.number}")

    async def prepare(self, agent: Agent) -> Relay:
        """Relays that serve the next command: those that are there, else new ones, which have no `uses` yet."""
        relay = self._remembered()
        if relay is not None:
            # One look for both: the relays' process, and the last command's, which the agent forgets by that.
            status, *_ = await agent.statuses(relay.pid, *(() if relay.last is None else (relay.last,)))
            runs = status is not None and not status.exited
            if runs and relay.clean and 0 < relay.uses < guest_scripts.USES:
                return relay
        return await self.renew(agent)

    async def renew(self, agent: Agent) -> Relay:
        """Start new relays in place of those that were there; their mark comes when they are ready."""
        mark = secrets.token_hex(16)
        pid = await agent.start(SH, ["-c", guest_scripts.RELAY, "sh", str(self.number), mark])
        relay = Relay(qemu=self._qemu(), pid=pid, mark=mark, clean=True)
        self.remember(relay)
        return relay

    def remember(self, relay: Relay) -> None:
        # A half-written memory, after a crash or on a full disk, is no memory, and then the relays are made anew.
        with contextlib.suppress(OSError):
            self._file.write_bytes(msgspec.json.encode(relay))

    def _remembered(self) -> Relay | None:
        try:
            relay = msgspec.json.decode(self._file.read_bytes(), type=Relay)
        except (msgspec.DecodeError, OSError):
            return None
        return relay if relay.qemu == self._qemu() else None

    def _qemu(self) -> tuple[int, int]:
        facts = self._paths.socket("agent").stat()
        return facts.st_ino, facts.st_ctime_ns


@contextlib.contextmanager
def free_slot(paths: VmPaths, name: str) -> Iterator[Slot | None]:
    """A slot that nobody uses, or None when all are in use or the VM hasn't got any."""
    with ExitStack() as stack:
        for number in range(SLOTS):
            if _has_ports(paths, number) and stack.enter_context(locked(paths.lock(f"stream{number}"), wait=False)):
                yield Slot(paths, name, number)
                return
        yield None


def _has_ports(paths: VmPaths, number: int) -> bool:
    return paths.socket(f"out{number}").exists()


async def forget(agent: Agent, pid: int) -> None:
    """Collect a process, so that the agent keeps no record of it, if it has ended."""
    with contextlib.suppress(GuestFailed):
        await agent.status(pid)
