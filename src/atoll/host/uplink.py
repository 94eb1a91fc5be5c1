"""A network's way out of its namespace: slirp4netns, which needs no privilege and keeps this computer's loopback shut.

It takes published ports over a socket, while it runs. It ends when the namespace's holder does.
"""

import asyncio
import contextlib
import os

from atoll.errors import NetworkFailed
from atoll.host import cgroups, facts, helper_jail, namespace, process, slirp
from atoll.host.link_text import UPLINK
from atoll.host.spawn import Program, spawn
from atoll.layout import NetworkPaths
from atoll.model.spec import PortSpec

READY_TIME = 20.0
DNS = "198.19.255.3"
"""Where slirp4netns answers for names, as the computer's own resolver would."""
_LINKS6 = f"addr replace fd00::100/64 dev {UPLINK} nodad\nroute replace default via fd00::2 dev {UPLINK}\n"
"""Slirp's own subnet, and its place there."""
_SAYING_NOTHING = ("WARNING: Support for ", "child failed")
_SUBNET, _LARGEST_PACKET = "198.19.255.0/24", "65520"


async def ensure(paths: NetworkPaths, holder: int, *, ipv6: bool) -> None:
    """Start the uplink unless it is there. Raises `NetworkFailed`, `MissingTool`."""
    if slirp.listener(paths.uplink) is not None:
        return
    _end_strays(paths, holder)
    ready, told = os.pipe()
    try:
        _start(paths, holder, told, ipv6=ipv6)
        if not await namespace.says(ready, b"1", READY_TIME):
            raise NetworkFailed(
                "a network has no way out", namespace.last_line(paths.log, but=_SAYING_NOTHING), f"See {paths.log}."
            )
    finally:
        os.close(ready)
    if ipv6:
        # It leaves these to router advertisements, which the network's own router doesn't take.
        await namespace.run(holder, "ip", "-6", "-batch", "-", stdin=_LINKS6)


def _end_strays(paths: NetworkPaths, holder: int) -> None:
    """One that a killed command has left on its way up would still take the name of our link."""
    ids = helper_jail.uplink_ids(paths.run.name, holder)
    namespace.end_all(facts.scan_for(_api_socket(paths), also_user=ids.user if ids else None))


def _api_socket(paths: NetworkPaths) -> str:
    return f"--api-socket={paths.uplink.name}"


def _start(paths: NetworkPaths, holder: int, told: int, *, ipv6: bool) -> None:
    """It says `1` on `told` when it is ready.

    Its own sandbox takes the place of the jail's root, and drops what the jail leaves it for opening its tap.
    """
    folder, binary = paths.uplink.parent, process.find(slirp.PROGRAM)
    slirp.make_workplace(folder)
    paths.uplink.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, told)
        alive = os.open(paths.alive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, alive)
        net = os.open(f"/proc/{holder}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, net)
        log = stack.enter_context(paths.log.open("ab"))
        argv = [binary, "--netns-type=path", "--configure", f"--mtu={_LARGEST_PACKET}", f"--cidr={_SUBNET}"]
        argv += ["--disable-host-loopback", "--enable-sandbox", "--enable-seccomp", _api_socket(paths)]
        argv += ["--enable-ipv6"] if ipv6 else []
        argv += [f"--exit-fd={alive}", f"--ready-fd={told}", f"/proc/self/fd/{net}", UPLINK]
        program = Program(
            argv=tuple(argv),
            descriptors=(alive, told, net),
            shown=(net,),
            output=log.fileno(),
            folder=str(folder),
        )
        network_id = paths.run.name
        jail = helper_jail.for_uplink(
            binary, network_id=network_id, holder=holder, folder=folder, groups=cgroups.entrances(network_id)
        )
        spawn(program, jail)


def end(paths: NetworkPaths) -> None:
    """It would end by itself, a moment after the network."""
    pid = slirp.listener(paths.uplink)
    if pid is not None:
        namespace.end_all([pid])


async def published(paths: NetworkPaths) -> list[tuple[str, PortSpec]]:
    """Each published port with the address of its VM. Raises `OSError` when nobody answers, as the others do."""
    return await asyncio.to_thread(slirp.published, paths.uplink)


async def publish(paths: NetworkPaths, address: str, port: PortSpec) -> None:
    """Raises `AlreadyExists` when another program has the port."""
    await asyncio.to_thread(slirp.add, paths.uplink, address, port)


async def unpublish(paths: NetworkPaths, address: str, port: PortSpec) -> None:
    """Idempotent."""
    await asyncio.to_thread(slirp.remove, paths.uplink, address, port)
