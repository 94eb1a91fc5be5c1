"""Small things that the guest agent does for other verbs."""

import contextlib
from typing import Any, Literal

from atoll.errors import AtollError, GuestFailed
from atoll.layout import VmPaths
from atoll.model.vm import Vm
from atoll.operations.guest_agent import exchange
from atoll.operations.guest_capture import collected
from atoll.operations.guest_slot import SH
from atoll.operations.services import Services

# The file makes it last; hostnamectl isn't everywhere, and systemd takes note of the kernel's name by itself.
_SET_HOSTNAME = 'printf "%s\\n" "$1" >/etc/hostname; hostname "$1" || printf %s "$1" >/proc/sys/kernel/hostname'


async def ping(paths: VmPaths, timeout: float, *, name: str = "the guest") -> None:
    """Return as soon as the agent answers, within `timeout` seconds. Raises `GuestFailed`."""
    async with exchange(paths, name, timeout=timeout):
        pass


async def settled(services: Services, vm: Vm, *, timeout: float = 2.0) -> None:
    """Have a guest that has just gone on learn the time; one that doesn't answer within `timeout` learns it later."""
    if vm.spec.guest.agent:
        with contextlib.suppress(AtollError):
            await ping(services.layout.vm(vm.id), timeout=timeout, name=vm.name)


async def shutdown(
    paths: VmPaths, mode: Literal["powerdown", "reboot", "halt"] = "powerdown", *, name: str = "the guest"
) -> None:
    """Ask the guest to shut down; returns when it was asked. Raises `GuestFailed`."""
    async with exchange(paths, name, timeout=5) as agent:
        await agent.shutdown(mode)


async def set_hostname(paths: VmPaths, hostname: str, *, name: str = "the guest") -> None:
    """Give a Linux guest its name, now and for later boots. Raises `GuestFailed`."""
    async with exchange(paths, name) as agent:
        pid = await agent.start(SH, ["-c", _SET_HOSTNAME, "sh", hostname], capture=True)
    status = await collected(paths, name, pid)
    if status.code != 0:
        raise GuestFailed(f"{name}: can't set its host name", status.stderr.decode(errors="replace").strip())


async def interfaces(paths: VmPaths, timeout: float = 10, *, name: str = "the guest") -> list[dict[str, Any]]:
    """The guest's network interfaces with addresses and statistics, as the agent tells them. Raises `GuestFailed`."""
    async with exchange(paths, name, timeout=timeout) as agent:
        return await agent.interfaces()


async def use_cpus(paths: VmPaths, timeout: float = 10, *, name: str = "the guest") -> int:
    """Let the guest use every processor that its kernel knows of; returns how many. Raises `GuestFailed`."""
    async with exchange(paths, name, timeout=timeout) as agent:
        cpus = await agent.call("guest-get-vcpus")
        idle = [{"logical-id": cpu["logical-id"], "online": True} for cpu in cpus if not cpu["online"]]
        if idle:
            await agent.call("guest-set-vcpus", vcpus=idle)
        return len(cpus)
