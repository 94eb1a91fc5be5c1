"""The peer's network: one as libvirt's `default` is, with two domains on it."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from atoll.host import syscalls
from bench import libvirt

T = TypeVar("T")
NETWORK = "atoll-bench"
GATEWAY = "10.98.0.1"
PAIR = ("atoll-bench-first", "atoll-bench-second")
XML = f"""<network><name>{NETWORK}</name><forward mode='nat'/><bridge name='virbr-bench' stp='on' delay='0'/>
<ip address='{GATEWAY}' netmask='255.255.255.0'><dhcp><range start='10.98.0.2' end='10.98.0.254'/></dhcp></ip>
</network>"""
BOOT_TIME = 120.0


@contextlib.contextmanager
def pair(domain: libvirt.Domain, folder: Path) -> Iterator[str]:
    """Two guests that answer, on the network; the address of the first."""
    with contextlib.ExitStack() as stack:
        libvirt.virsh("net-create", "/dev/stdin", text=XML)
        stack.callback(libvirt.virsh, "net-destroy", NETWORK)
        folder.mkdir(parents=True, exist_ok=True)
        for name in PAIR:
            disk = folder / f"{name}.qcow2"
            backing = ["-f", "qcow2", "-F", "qcow2", "-b", domain.disk]
            subprocess.run(["qemu-img", "create", "-q", *backing, disk], check=True, capture_output=True)
            text = replace(domain, disk=disk, network=NETWORK).xml(name)
            libvirt.virsh("create", "/dev/stdin", text=text)
            stack.callback(libvirt.virsh, "destroy", name)
        first, _ = (_address(name) for name in PAIR)
        yield first


def _address(name: str) -> str:
    """Once the guest has one by DHCP."""
    deadline = time.monotonic() + BOOT_TIME
    ask = "ip -4 -o addr show dev eth0 | sed -n 's|.* inet \\([0-9.]*\\)/.*|\\1|p'"
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.CalledProcessError, RuntimeError):
            if found := libvirt.sh(name, ask).strip():
                return found
        time.sleep(0.5)
    raise RuntimeError(f"{name} has no address after {BOOT_TIME:g} s")


def inside(pid: int, make: Callable[[], T]) -> T:
    """What `make` makes in the network namespace of a process: a socket stays in the one that it was made in, and a
    thread may be in another one than the others.
    """
    made: list[T] = []

    def enter() -> None:
        with Path(f"/proc/{pid}/ns/net").open("rb") as space:
            syscalls.setns(space.fileno(), syscalls.CLONE_NEWNET)
        made.append(make())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if not made:
        raise RuntimeError("the namespace of libvirt's network can't be entered")
    return made[0]
