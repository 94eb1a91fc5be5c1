"""A network namespace with a process that holds it, and ways into it. The same for root and for an ordinary user.

The namespace belongs to a user namespace in which whoever made it is root, so a bridge, taps and filters need no
privilege outside. The holder is a shell of 1.6 MiB that starts dnsmasq again whenever it ends; both are shut in
(`helper_jail.py`), as another user of that user namespace.
"""

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from atoll.errors import AtollError, NetworkFailed, from_os_error
from atoll.host import cgroups, facts, files, helper_jail, process, syscalls
from atoll.host.sandbox import own_ids
from atoll.host.spawn import Program, spawn
from atoll.layout import NetworkPaths
from atoll.model.network import Network

MARK = "atoll-network"
"""The word before a network's id in its holder's argv."""
START_TIME = 20.0
"""Seconds until a namespace has to be ready on a busy computer; it takes some 50 ms."""
END_TIME = 5.0
"""Seconds until it has to be gone, with all that it started; it takes some ms."""
_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
# From the kernel's header if_tun.h.
_SET_INTERFACE, _TAP, _NO_INFORMATION, _OFFLOADS = 0x400454CA, 0x0002, 0x1000, 0x4000

LINKS = r"""
echo 1 >/proc/sys/net/ipv4/ip_forward
for each in disable_ipv6 accept_ra accept_dad; do
    [ ! -e /proc/sys/net/ipv6 ] || echo 0 >/proc/sys/net/ipv6/conf/default/$each
done
[ ! -e /proc/sys/net/ipv6 ] || echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
ip -batch "$1/links" && nft -f "$1/rules.nft" && echo 1 >/proc/sys/net/ipv4/conf/default/proxy_arp
"""
"""An uplink that comes asks for VMs as for neighbours, and is answered; so published ports need no translation of
addresses. It is the only one on which that is heard.
"""
HOLDER = r"""
read -r _ || exit
trap '' HUP
for each in dns dhcp; do
    "$3" --test -C "$2/$each.conf" || exit
    while :; do "$3" -d -C "$2/$each.conf" || "$4" 1; done >&2 &
done
echo ready
exec >&2
wait
"""
"""It waits for the links, of which it is told by a line, and tells when it is ready. It is the first process of a pid
namespace, and takes all others along. SIGHUP to its group makes dnsmasq read the names again; whoever would not know
what to do with it ignores it. Names and addresses are two processes: else names that DHCP has met stay known when their
VM is gone.
"""


def holder_of(paths: NetworkPaths) -> facts.ProcessIdentity | None:
    """The process that holds the network's namespace, if it lives."""
    try:
        known = msgspec.json.decode(paths.holder.read_bytes(), type=facts.ProcessIdentity)
    except (OSError, msgspec.DecodeError):
        return None
    return known if facts.is_alive(known) else None


async def hold(network: Network, paths: NetworkPaths) -> facts.ProcessIdentity:
    """Make the namespace, with what the files in `paths` say in it. Raises `NetworkFailed`, `MissingTool`."""
    end(network.id, paths)
    ready, told = os.pipe()
    waiting, going = os.pipe()
    try:
        try:
            holder = _start(network, paths, waiting, told)
        finally:
            os.close(waiting)
            os.close(told)
        identity = facts.identity_of(holder)
        if identity is not None:
            await run(holder, "sh", "-c", LINKS, MARK, str(paths.run))
            os.write(going, b"go\n")
        if identity is None or not await says(ready, b"ready", START_TIME):
            raise NetworkFailed("a network can't be brought up", last_line(paths.log), "Run `atoll doctor`.")
        # What a command that is killed before this leaves, ends by itself or at the next one's `end`.
        files.write_atomically(paths.holder, msgspec.json.encode(identity))
        return identity
    except (AtollError, BrokenPipeError):
        end(network.id, paths)
        raise
    finally:
        os.close(ready)
        os.close(going)


def _start(network: Network, paths: NetworkPaths, waiting: int, told: int) -> int:
    """The holder's pid. `alive` is open in it for as long as it lives."""
    sh, dnsmasq, sleep = (process.find(each) for each in ("sh", "dnsmasq", "sleep"))
    alive = os.open(paths.alive, os.O_RDWR | os.O_CLOEXEC)
    try:
        with paths.log.open("ab") as log:
            program = Program(
                argv=(sh, "-c", HOLDER, MARK, network.id, str(paths.names), dnsmasq, sleep),
                descriptors=(alive,),
                input=waiting,
                output=told,
                errors=log.fileno(),
            )
            ipv6 = network.subnet6 is not None
            groups = cgroups.make(network.id, helper_jail.OF_A_NETWORK).entrances
            jail = helper_jail.for_names(
                (sh, dnsmasq, sleep), network_id=network.id, files=paths.names, ipv6=ipv6, groups=groups
            )
            return spawn(program, jail).pid
    finally:
        os.close(alive)


async def says(descriptor: int, word: bytes, seconds: float) -> bool:
    """Whether the other end of a pipe says this before it is closed, in time."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), seconds)
        return os.read(descriptor, 16).startswith(word)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)


def last_line(log: Path, *, but: tuple[str, ...] = ()) -> str:
    """What was said last; lines that begin with one of `but` say nothing."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if not line.startswith(but)), "nothing was said")
    return "nothing was said"


def read_again(network_id: str, paths: NetworkPaths, holder: int) -> None:
    """Let dnsmasq know that names or addresses have changed. The one that gives addresses starts anew: else it keeps
    those of cards that are gone for an hour, and refuses them to whose they are now.
    """
    ids = own_ids(network_id)
    for pid in facts.scan_for(str(paths.dhcp), after="-C", also_user=ids.user if ids else None):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(holder), signal.SIGHUP)


def end(network_id: str, paths: NetworkPaths) -> None:
    """End the holder, also one that a killed command has left unrecorded. dnsmasq ends with it, the uplink after it."""
    ids = own_ids(network_id)
    end_all(facts.scan_for(network_id, after=MARK, also_user=ids.user if ids else None))
    paths.holder.unlink(missing_ok=True)
    cgroups.remove(network_id, within=END_TIME)


def end_all(pids: Sequence[int]) -> None:
    """SIGKILL, and wait until they are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                select.select([handle], [], [], END_TIME)
            finally:
                os.close(handle)


def entered(holder: int, *, net: bool = True, user: bool = True) -> list[str]:
    """What runs a program in the namespace; without `net` only in the user namespace that it belongs to. Root needs
    not enter that.
    """
    kinds = [*(["--user", "--preserve-credentials"] if user else []), *(["--net"] if net else [])]
    return [process.find("nsenter"), *kinds, f"--target={holder}", "--"]


async def run(holder: int, *argv: str, stdin: str = "") -> process.Finished:
    """Run a program in the namespace to its end. Raises `ProcessFailed`."""
    return await process.run([*entered(holder), *argv], stdin=stdin.encode(), env={"PATH": _PATH})


def open_tap(holder: int | None, name: str) -> int:
    """A descriptor of a new tap in the namespace; without a holder in one where there is nothing else. The tap goes
    when its last descriptor is closed. Raises `NetworkFailed`.
    """
    return open_inside(holder, lambda: [make_tap(name)], "a network tap")[0]


def make_tap(name: str) -> int:
    """For `open_inside`."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _TAP | _NO_INFORMATION | _OFFLOADS))
    return tap


def announce(interface: str, mac: str, address: str) -> None:
    """For `open_inside`: tell all who an address belongs to (RFC 5227, section 2.3). Who has met the one before would
    send to that for half a minute.
    """
    sender, owner = bytes.fromhex(mac.replace(":", "")), socket.inet_aton(address)
    request = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + sender + owner + bytes(6) + owner
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as line:
        line.bind((interface, 0))
        line.send(b"\xff" * 6 + sender + b"\x08\x06" + request)


def open_inside(holder: int | None, make: Callable[[], Sequence[int]], what: str) -> list[int]:
    """Descriptors that `make` opens in the namespace; without a holder in a new one that nobody else is in.

    Entering a user namespace takes a process with one thread, so a child does it: a fork takes 2 ms, where starting
    another Python takes 30. Raises `NetworkFailed`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with warnings.catch_warnings():
            # Newer Pythons warn when other threads are there; the child only makes system calls.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _open_and_exit(holder, make, theirs)
        theirs.close()
        message, descriptors, _, _ = socket.recv_fds(ours, 256, 4)
        os.waitpid(child, 0)
    except OSError as error:
        raise from_os_error(error, f"make {what}") from error
    finally:
        ours.close()
        theirs.close()
    if not descriptors:
        raise NetworkFailed(f"{what} can't be made", message.decode(errors="replace") or "the kernel refuses it")
    return list(descriptors)


def _open_and_exit(holder: int | None, make: Callable[[], Sequence[int]], answer: socket.socket) -> None:
    """In the child: say no more than is needed, and never return."""
    try:
        enter(holder)
        socket.send_fds(answer, [b"made"], make())
    except BaseException as error:
        with contextlib.suppress(BaseException):
            answer.send(str(error).encode()[:250])
    finally:
        os._exit(0)


def enter(holder: int | None) -> None:
    """Let this process, which has one thread, go into the namespace, or into a new one. Raises `OSError`."""
    if holder is None:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNET)
        return
    kinds = (("user", syscalls.CLONE_NEWUSER), ("net", syscalls.CLONE_NEWNET))
    spaces = [(os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC), flag) for kind, flag in kinds]
    for space, flag in spaces:
        syscalls.setns(space, flag)
        os.close(space)
