"""A network's way out of its namespace: slirp4netns, which needs no privilege and keeps this computer's loopback shut.

It takes published ports over a socket, while it runs. It ends when the namespace's holder does.
"""

import asyncio
import json
import os
import subprocess
from typing import Any

from atoll.errors import AlreadyExists, NetworkFailed
from atoll.host import namespace, process
from atoll.host.network_text import UPLINK
from atoll.host.sockets import connect
from atoll.layout import NetworkPaths
from atoll.model.spec import PortSpec

READY_TIME = 20.0
ANSWER_TIME = 10.0
DNS = "198.19.255.3"
"""Where slirp4netns answers for names, as the computer's own resolver would."""
_SUBNET, _LARGEST_PACKET = "198.19.255.0/24", "65520"


async def ensure(paths: NetworkPaths, holder: int) -> None:
    """Start the uplink unless it is there. Raises `NetworkFailed`, `MissingTool`."""
    if await _answers(paths):
        return
    ready, told = os.pipe()
    try:
        _start(paths, holder, told)
        if not await namespace.says(ready, b"1", READY_TIME):
            raise NetworkFailed("a network has no way out", namespace.last_line(paths.log), f"See {paths.log}.")
    finally:
        os.close(ready)
    # slirp4netns asks for VMs as for neighbours; so published ports need no translation of addresses.
    await namespace.run(holder, "sh", "-c", f"echo 1 >/proc/sys/net/ipv4/conf/{UPLINK}/proxy_arp")


def _start(paths: NetworkPaths, holder: int, told: int) -> None:
    """It says `1` on `told` when it is ready."""
    alive = os.open(paths.alive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    # Root's may publish ports below 1024; an ordinary user's has to be in the user namespace to enter the other.
    inside = [] if os.geteuid() == 0 else namespace.entered(holder, net=False)
    argv = [*inside, process.find("slirp4netns"), "--netns-type=path", "--configure", f"--mtu={_LARGEST_PACKET}"]
    argv += ["--disable-host-loopback", "--enable-sandbox", "--enable-seccomp", f"--cidr={_SUBNET}"]
    argv += ["--api-socket=uplink.sock", f"--exit-fd={alive}", f"--ready-fd={told}", f"/proc/{holder}/ns/net", UPLINK]
    paths.uplink.unlink(missing_ok=True)
    try:
        with paths.log.open("ab") as log:
            subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(alive, told),
                cwd=paths.run,
                start_new_session=True,
            )
    finally:
        os.close(alive)
        os.close(told)


async def _answers(paths: NetworkPaths) -> bool:
    try:
        await _ask(paths, {"execute": "list_hostfwd"})
    except (OSError, NetworkFailed):
        return False
    return True


async def published(paths: NetworkPaths) -> list[tuple[int, str, PortSpec]]:
    """Each published port with its number and the address of its VM."""
    answer = await _ask(paths, {"execute": "list_hostfwd"})
    return [
        (
            entry["id"],
            entry["guest_addr"],
            PortSpec(
                host_port=entry["host_port"],
                guest_port=entry["guest_port"],
                host_address=entry["host_addr"],
                protocol=entry["proto"],
            ),
        )
        for entry in answer["entries"]
    ]


async def publish(paths: NetworkPaths, address: str, port: PortSpec) -> None:
    """Raises `AlreadyExists` when another program has the port."""
    arguments = {
        "proto": port.protocol, "host_addr": port.host_address, "host_port": port.host_port,
        "guest_addr": address, "guest_port": port.guest_port,
    }  # fmt: skip
    answer = await _ask(paths, {"execute": "add_hostfwd", "arguments": arguments})
    if "error" in answer:
        raise AlreadyExists(
            f"port {port.host_port} on {port.host_address} can't be published",
            "another program has it, or it is below 1024 and root's",
            "Choose another with -p.",
        )


async def unpublish(paths: NetworkPaths, address: str, port: PortSpec) -> None:
    """Idempotent."""
    for number, of, other in await published(paths):
        if (of, other) == (address, port):
            await _ask(paths, {"execute": "remove_hostfwd", "arguments": {"id": number}})


async def _ask(paths: NetworkPaths, question: dict[str, Any]) -> Any:
    """One question a connection. Raises `OSError` when nobody listens."""
    client = connect(paths.uplink)
    try:
        reader, writer = await asyncio.open_unix_connection(sock=client)
        try:
            writer.write(json.dumps(question).encode())
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), ANSWER_TIME)
        finally:
            writer.close()
        return json.loads(answer)
    except (TimeoutError, ValueError) as error:
        raise NetworkFailed("a network's uplink doesn't answer", str(error)) from error
