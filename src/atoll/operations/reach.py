"""Byte streams to what a VM has: a TCP port of its guest, its display. Changes no record.

A published port is used as it is. A card on a shared network is reached from that network's namespace, one on a
user-mode network through a port that is published for as long as it takes to get in.
"""

import asyncio
import contextlib
import socket

from atoll.errors import AlreadyExists, AtollError, InvalidInput, NetworkFailed, Unsupported
from atoll.host import facts, namespace, user_network
from atoll.model.spec import NicSpec, PortSpec
from atoll.model.state import require
from atoll.model.vm import Vm
from atoll.operations import observe
from atoll.operations.look import observing, require_display
from atoll.operations.services import Services
from atoll.qemu.monitor import Monitor

CHUNK = 64 << 10
CONNECT_TIME = 10.0
"""Seconds for a guest to answer."""
_LOOPBACK = "127.0.0.1"
_TRIES = 5
_EVERYWHERE = {"0.0.0.0": _LOOPBACK, "::": "::1"}  # nobody listens there


class Channel:
    """A two-way byte stream (`platform.api.Connection`)."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected

    async def read(self) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(self._socket, CHUNK)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def end(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        self._socket.close()


async def open_display(vm: Vm, *, services: Services) -> Channel:
    """RFB, as VNC viewers speak it. Raises `Unsupported` without a display, `WrongState` when it is stopped."""
    require_display(vm)
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            await observing(services, vm, lambda monitor: _hand_display(monitor, theirs.fileno()))
    except BaseException:
        ours.close()
        raise
    return Channel(ours)


async def _hand_display(monitor: Monitor, descriptor: int) -> None:
    # A name of its own: another one may be handed over at the same time.
    name = f"display-{descriptor}"
    await monitor.send_descriptor("getfd", {"fdname": name}, descriptor)
    await monitor.execute("add_client", {"protocol": "vnc", "fdname": name, "skipauth": True})


async def open_port(vm: Vm, port: int, *, services: Services) -> Channel:
    """A TCP connection to a port of the guest.

    Raises `WrongState` unless it runs, `Unsupported` without a network that leads to it, `NetworkFailed` when nobody
    answers.
    """
    if not 1 <= port <= 65535:
        raise InvalidInput(f"{port} is no port", next_step="Give a number from 1 to 65535.")
    require(vm.name, observe.phase_of(services, vm), "exec")
    try:
        async with asyncio.timeout(CONNECT_TIME):
            return Channel(await _connected(vm, port, services))
    except (OSError, TimeoutError) as error:
        raise NetworkFailed(
            f"{vm.name}: nobody answers at port {port}",
            str(error) or f"nothing came back in {CONNECT_TIME:g} s",
            _where_to_look(vm),
        ) from error


def _where_to_look(vm: Vm) -> str:
    look = f"See in the guest what listens there: `atoll exec {vm.name} -- netstat -tln`."
    groups = next((nic.groups for nic in vm.spec.nics if nic.network is not None and nic.address is not None), ())
    if not groups:
        return look
    return (
        f"{look} Its card has the security groups {' '.join(groups)}, which hold for this computer as well: let in the "
        "network's own address, or publish the port."
    )


async def _connected(vm: Vm, port: int, services: Services) -> socket.socket:
    for nic in vm.spec.nics:
        for known in nic.ports:
            if (known.guest_port, known.protocol) == (port, "tcp"):
                return await _dialled(_EVERYWHERE.get(known.host_address, known.host_address), known.host_port)
    for nic in vm.spec.nics:
        if nic.network is None:
            return await _through_helper(vm, nic, port, services)
        if nic.address is not None and (holder := namespace.holder_of(services.layout.network(nic.network))):
            return await _from_inside(holder.pid, nic.address, port)
    raise Unsupported(
        f"{vm.name}: its ports can't be reached from here",
        "it has no card on a network of Atoll's own",
        "On a bridge a VM is reached by its own address; else attach it to a network: `atoll net attach`.",
    )


async def _dialled(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return await _connect(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC), address, port)


async def _connect(made: socket.socket, address: str, port: int) -> socket.socket:
    try:
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, (address, port))
    except BaseException:
        made.close()
        raise
    return made


async def _from_inside(holder: int, address: str, port: int) -> socket.socket:
    def make() -> list[int]:
        return [socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC).detach()]

    # A socket belongs for ever to the namespace that it was made in.
    (descriptor,) = namespace.open_inside(holder, make, "a socket in the network")
    return await _connect(socket.socket(fileno=descriptor), address, port)


async def _through_helper(vm: Vm, nic: NicSpec, port: int, services: Services) -> socket.socket:
    control = services.layout.vm(vm.id).network_control(nic.name)
    for left in reversed(range(_TRIES)):
        published = PortSpec(host_address=_LOOPBACK, host_port=_free_port(), guest_port=port)
        try:
            user_network.publish(control, published, restrict=nic.restrict)
            break
        except AlreadyExists:
            # Somebody took it just then.
            if not left:
                raise
    try:
        connected = await _dialled(_LOOPBACK, published.host_port)
        try:
            while facts.waits_to_be_accepted(published.host_port):  # noqa: ASYNC110  # the kernel tells nobody
                await asyncio.sleep(0.001)
        except BaseException:
            connected.close()
            raise
        return connected
    finally:
        with contextlib.suppress(AtollError):
            user_network.unpublish(control, published, restrict=nic.restrict)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])
