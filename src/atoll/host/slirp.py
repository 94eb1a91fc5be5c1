"""slirp4netns's control socket: ports are published, and taken back, by one question and one answer (slirp4netns(1)).

Everything here raises `OSError` when nobody answers. An answer comes within a millisecond.
"""

import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atoll.errors import AlreadyExists
from atoll.host import descriptors
from atoll.host.files import make_folder
from atoll.host.sockets import address_of
from atoll.model.spec import PortSpec

PROGRAM = "slirp4netns"
ANSWER_TIME = 5
CALLERS = 1024
"""How many may call at the same moment. The program itself lets one wait (libslirp's `listen(s, 1)`): the kernel drops
what the others send, and they try again seconds later.
"""
_MOST = 1024
"""Descriptors of the program that are looked at."""


def make_workplace(folder: Path) -> None:
    """Where it makes its sockets, as a user of its own. The folder that it is in keeps others out."""
    make_folder(folder)
    os.chmod(folder, 0o777)  # noqa: PTH101 - a mask of ours would take a part of it from mkdir


def listener(control: Path) -> int | None:
    """The process that listens there; None when it has ended."""
    try:
        with _called(control) as client:
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    return int(struct.unpack("3i", credentials)[0])


def add(control: Path, address: str, port: PortSpec) -> None:
    """Publish a port of the guest with that address. Raises `AlreadyExists` when it can't have it."""
    said = _ask(
        control,
        "add_hostfwd",
        {
            "proto": port.protocol, "host_addr": port.host_address, "host_port": port.host_port,
            "guest_addr": address, "guest_port": port.guest_port,
        },
    )  # fmt: skip
    if "error" in said:
        raise AlreadyExists(
            f"port {port.host_port} on {port.host_address} can't be published",
            "another program has it, or this user may not have it",
            "Choose another with -p.",
        )
    if port.protocol == "tcp":
        _let_many_call(control, port)


def _let_many_call(control: Path, port: PortSpec) -> None:
    """listen(2) on a socket that listens changes how many wait. Where we may not, it stays as it is."""
    pid = listener(control)
    if pid is None:
        return
    with contextlib.suppress(OSError), descriptors.handle(pid) as its:
        for copy in descriptors.copies(its, most=_MOST):
            if not stat.S_ISSOCK(os.fstat(copy).st_mode):
                continue
            with socket.socket(fileno=os.dup(copy)) as found, contextlib.suppress(OSError):
                internet = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
                if internet and found.getsockname()[1] == port.host_port:
                    found.listen(CALLERS)


def remove(control: Path, address: str, port: PortSpec) -> None:
    """Idempotent. Connections that stand go on."""
    for number, its_address, there in _forwards(control):
        if (its_address, _place(there)) == (address, _place(port)):
            _ask(control, "remove_hostfwd", {"id": number})


def published(control: Path) -> list[tuple[str, PortSpec]]:
    """Each published port with the address of its guest."""
    return [(address, port) for _, address, port in _forwards(control)]


def _place(port: PortSpec) -> tuple[str, str, int]:
    return port.protocol, port.host_address, port.host_port


def _forwards(control: Path) -> Iterator[tuple[int, str, PortSpec]]:
    for entry in _ask(control, "list_hostfwd", {}).get("entries", []):
        port = PortSpec(
            protocol=entry["proto"],
            host_address=entry["host_addr"],
            host_port=entry["host_port"],
            guest_port=entry["guest_port"],
        )
        yield entry["id"], entry["guest_addr"], port


def _called(control: Path) -> socket.socket:
    """A connection. It lets only one wait: so this waits for the one before."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Python's own timeouts make a connection fail at once where it would have to wait.
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            client.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", ANSWER_TIME, 0))
        with address_of(control) as address:
            client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def _ask(control: Path, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """It hangs up after its answer."""
    question = {"execute": verb} | ({"arguments": arguments} if arguments else {})
    with _called(control) as client:
        client.sendall(json.dumps(question).encode())
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    try:
        found: dict[str, Any] = json.loads(answer)
    except ValueError as error:
        raise OSError("it said nothing") from error
    return found
