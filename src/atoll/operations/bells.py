"""A sleeping VM's bell: its cards' networks, kept up by the agent, so that callers find its ports open, and wake it.

    client ── helper or uplink ── link or tap ══ the agent listens            while it sleeps
    client ── helper or uplink ── link or tap ══ QEMU                         from its start on: the same descriptors

Nobody passes connections on: slirp4netns takes and keeps them while the guest sleeps, and what is sent to the guest
waits in its link. So the guest sees callers by their own addresses, and rules hold, as if it had run all the time. Who
starts the VM, the agent or a command beside it, asks for the descriptors at the bell's socket.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Collection

import msgspec

from atoll.errors import Unsupported
from atoll.host import cgroups, sleeping_link, sockets, user_network
from atoll.host.files import make_folder
from atoll.layout import VmPaths
from atoll.model.launch import UserNetwork
from atoll.model.spec import NicSpec
from atoll.model.vm import Vm
from atoll.operations import networks
from atoll.operations.services import Services
from atoll.qemu.devices import network_descriptor
from atoll.qemu.plan import user_network_of

ANSWER_TIME = 10.0
"""Seconds after which an agent that doesn't hand over is taken for dead; its end frees the ports."""
_MOST = 64
"""Descriptors that are handed over at once."""


class Kept(msgspec.Struct, kw_only=True):
    """What is handed over: descriptors by the names that a plan gives them."""

    descriptors: dict[str, int] = msgspec.field(default_factory=dict)
    weaker: tuple[str, ...] = ()
    """A sentence about each helper that is confined less than it should be."""

    def close(self) -> None:
        for each in self.descriptors.values():
            os.close(each)
        self.descriptors = {}


def answering(vm: Vm) -> list[NicSpec]:
    """Its cards with published ports, which callers come through."""
    return [nic for nic in vm.spec.nics if nic.ports]


async def keep(services: Services, vm: Vm, had: Kept | None = None) -> Kept:
    """Bring up the networks of a VM that sleeps, with its ports, but for those that the caller had and gives away. The
    caller holds its lock.

    Raises what a start would: `AlreadyExists` for a port that is taken, `MissingTool`, `EngineFailed`, `NetworkFailed`.
    """
    kept, paths = had or Kept(), services.layout.vm(vm.id)
    make_folder(paths.run)
    try:
        for nic in answering(vm):
            if network_descriptor(nic) in kept.descriptors:
                pass
            elif nic.network is None:
                _keep_helper(kept, user_network_of(paths, nic))
                if vm.spec.isolation == "strict" and kept.weaker:
                    raise Unsupported("the isolation 'strict' isn't possible here", "; ".join(kept.weaker))
            else:
                kept.descriptors[network_descriptor(nic)] = await networks.tap_for(services, vm, nic)
            sleeping_link.fall_asleep(kept.descriptors[network_descriptor(nic)], mac=nic.mac, address=address_of(nic))
    except BaseException:
        kept.close()
        raise
    return kept


def inherit(services: Services, vm: Vm, engine: int) -> Kept:
    """The user-mode networks of a QEMU that has saved its memory and is about to end, with all who are connected.

    What can't be had is made anew later on.
    """
    kept, paths = Kept(), services.layout.vm(vm.id)
    for nic in answering(vm):
        network = user_network_of(paths, nic)
        if nic.network is None and (had := sleeping_link.inherited(engine, paths.network_control(nic.name))):
            kept.descriptors[network.name], kept.descriptors[network.lifeline] = had
    return kept


def _keep_helper(kept: Kept, network: UserNetwork) -> None:
    link = user_network.open_link(network)
    kept.descriptors[network.name] = os.dup(link.frames.fileno())
    link.frames.close()
    kept.descriptors[network.lifeline] = link.lifeline
    kept.weaker = (*kept.weaker, link.weaker) if link.weaker else kept.weaker


def address_of(nic: NicSpec) -> str:
    """Where its callers are led to."""
    return user_network.GUEST if nic.network is None else nic.address or user_network.NOWHERE


def hand_over(client: socket.socket, kept: Kept) -> None:
    """Give them to who starts the VM; from then on they are no longer ours."""
    told = msgspec.json.encode((list(kept.descriptors), kept.weaker))
    with contextlib.suppress(OSError):
        socket.send_fds(client, [told], list(kept.descriptors.values()))
    kept.close()


@contextlib.asynccontextmanager
async def taken(paths: VmPaths, wanted: Collection[NicSpec]) -> AsyncIterator[Kept]:
    """What the agent has kept for these cards, if it has; our copies are closed when this is left."""
    kept = await _ask(paths)
    names = {name for nic in wanted for name in (network_descriptor(nic), f"{network_descriptor(nic)}-lifeline")}
    for name in [each for each in kept.descriptors if each not in names]:
        os.close(kept.descriptors.pop(name))
    try:
        yield kept
    finally:
        kept.close()


async def silence(paths: VmPaths) -> None:
    """Let its networks and ports go, which the agent keeps up; nothing happens where it doesn't."""
    (await _ask(paths)).close()


async def _ask(paths: VmPaths) -> Kept:
    try:
        client = sockets.connect(paths.socket("bell"))
    except OSError:
        return Kept()
    with client:
        try:
            async with asyncio.timeout(ANSWER_TIME):
                await _readable(client)
            told, descriptors, _, _ = socket.recv_fds(client, 1 << 16, _MOST, socket.MSG_CMSG_CLOEXEC)
        except (OSError, TimeoutError):
            return Kept()
    try:
        names, weaker = msgspec.json.decode(told, type=tuple[list[str], tuple[str, ...]])
    except msgspec.DecodeError:
        names, weaker = [], ()
    for each in descriptors[len(names) :]:
        os.close(each)
    return Kept(descriptors=dict(zip(names, descriptors, strict=False)), weaker=weaker)


async def _readable(client: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(client, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(client)


def give(kept: Kept, paths: VmPaths, nics: Collection[NicSpec], *, groups: tuple[str, ...]) -> None:
    """Before QEMU gets them: they carry all frames again, and their helpers count as parts of the VM."""
    for nic in nics:
        if (descriptor := kept.descriptors.get(network_descriptor(nic))) is not None:
            sleeping_link.wake_up(descriptor)
            helper = user_network.helper_of(paths.network_control(nic.name)) if nic.network is None else None
            if helper is not None:
                cgroups.enter(helper, groups)


def names_of(descriptors: Collection[str]) -> set[str]:
    """The cards' names."""
    return {name.removeprefix("nic-") for name in descriptors if not name.endswith("-lifeline")}
