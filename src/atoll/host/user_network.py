"""User-mode networks: beside each QEMU a helper process (slirp4netns) that speaks for the guest by sockets of the host.

QEMU itself may then be without a network and without the right to make sockets. The link between the two carries a
frame in each message. The helper sees what `frame_filter` lets through, is shut in (`helper_jail.py`), and ends as soon
as nobody holds its lifeline: QEMU has it, so that they end together.
"""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import EngineFailed, Unsupported
from atoll.host import frame_filter, helper_jail, process, slirp
from atoll.host.jail import Jail
from atoll.host.sockets import connect
from atoll.host.spawn import Program, spawn
from atoll.model.launch import UserNetwork
from atoll.model.spec import PortSpec

GUEST = "10.0.2.15"
"""The address that the helper's DHCP gives first."""
NOWHERE = "240.0.0.1"
"""No host's address (RFC 1112, section 4): who must use it as its own gets no connection out."""
START_TIME = 20.0
"""Seconds until a helper must be ready; it takes 5 ms on an idle computer."""
_PAUSE = 0.0005


class _Refused(Exception):
    """The helper ended before it was ready."""


@dataclass(frozen=True)
class Link:
    """One NIC's network, ready for a QEMU."""

    frames: socket.socket
    lifeline: int
    """The writing end of a pipe: when the last copy of it closes, the helper ends."""
    weaker: str
    """What the helper isn't confined by and why; empty when all is as it should be."""

    def close(self) -> None:
        """Drop our copies; unless a QEMU has others, the helper ends."""
        self.frames.close()
        os.close(self.lifeline)


@dataclass(frozen=True)
class _Helper:
    """One that has just been started."""

    pid: int
    handle: int
    """A pidfd."""
    errors: int
    """What it says."""

    def close(self) -> None:
        os.close(self.handle)
        os.close(self.errors)


def command(network: UserNetwork, *, lifeline: int, ready: int) -> tuple[str, ...]:
    """The helper's command line, to be run in the folder of its sockets.

    It isn't given its own sandbox, whose root has /etc and /run in it: it has ours.
    """
    words = [process.find(slirp.PROGRAM), "--target-type=bess", f"--exit-fd={lifeline}", f"--ready-fd={ready}"]
    words += [f"--api-socket={Path(network.control).name}", "--enable-seccomp"]
    words += [f"--outbound-addr={NOWHERE}", "--disable-dns"] if network.restrict else ["--enable-ipv6"]
    return (*words, Path(network.link).name)


def open_link(network: UserNetwork, *, groups: tuple[str, ...] = ()) -> Link:
    """Start the helper of a network, in these control groups, guarded and with its ports published.

    Raises `MissingTool`, `EngineFailed`, `AlreadyExists` for a port that is taken; then no helper is left.
    """
    if network.restrict:
        _check_nowhere()
    let_go(Path(network.link))
    try:
        return _start(network, groups)
    except _Refused as error:
        raise EngineFailed("the network's helper ended at its start", str(error), "Run `atoll doctor`.") from error


def _check_nowhere() -> None:
    """That this host really has no such address, nor lets programs use what isn't its own (`ip_nonlocal_bind`)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((NOWHERE, 0))
        except OSError:
            return
    raise Unsupported(
        "a network without a way out can't be made",
        f"this computer lets programs send as {NOWHERE}",
        "Set net.ipv4.ip_nonlocal_bind to 0, or use `--network none`.",
    )


def _start(network: UserNetwork, groups: tuple[str, ...]) -> Link:
    files = () if network.restrict else ("/etc/resolv.conf",)
    shut_in = helper_jail.for_user_network(
        process.find(slirp.PROGRAM), folder=Path(network.link).parent, files=files, groups=groups
    )
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as on_failure:
        hanging_up, lifeline = os.pipe()
        on_failure.callback(os.close, lifeline)
        ready, telling = os.pipe()
        stack.callback(os.close, ready)
        try:
            helper = _spawn(network, shut_in.jail, hanging_up, telling)
        finally:
            os.close(hanging_up)
            os.close(telling)
        # Later on nobody reads what it says: a guest could fill a log with it.
        stack.callback(helper.close)
        on_failure.callback(_end, helper)
        frames = on_failure.enter_context(_connected(helper, Path(network.link)))
        if not _is_ready(ready):
            raise _Refused(_last_words(helper))
        Path(network.link).unlink(missing_ok=True)
        frame_filter.guard(helper.pid, restrict=network.restrict, udp_ports=_of_udp(network.ports))
        for port in network.ports:
            with _answering():
                slirp.add(Path(network.control), GUEST, port)
        on_failure.pop_all()
        weaker = f"the network of {network.name.removeprefix('nic-')}: {shut_in.weaker}" if shut_in.weaker else ""
        return Link(frames=frames, lifeline=lifeline, weaker=weaker)


def _spawn(network: UserNetwork, jail: Jail, hanging_up: int, telling: int) -> _Helper:
    folder = Path(network.link).parent
    slirp.make_workplace(folder)
    errors, saying = os.pipe()
    nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    program = Program(
        argv=command(network, lifeline=hanging_up, ready=telling),
        descriptors=(hanging_up, telling),
        output=nothing,
        errors=saying,
        folder=str(folder),
    )
    try:
        pid = spawn(program, jail)
        return _Helper(pid=pid, handle=os.pidfd_open(pid), errors=errors)
    except BaseException as error:
        os.close(errors)
        if isinstance(error, ProcessLookupError):
            raise _Refused("it said nothing") from error
        raise
    finally:
        os.close(saying)
        os.close(nothing)


def _connected(helper: _Helper, path: Path) -> socket.socket:
    """A connection, as soon as the helper listens: it tells nobody when that is. Raises `_Refused`."""
    deadline = time.monotonic() + START_TIME
    while True:
        try:
            return connect(path, kind=socket.SOCK_SEQPACKET)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            if _has_ended(helper, seconds=_PAUSE) or time.monotonic() > deadline:
                raise _Refused(_last_words(helper)) from None


def _is_ready(ready: int) -> bool:
    """Whether it says so in time, before it ends."""
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    return bool(poll.poll(START_TIME * 1000)) and os.read(ready, 1) != b""


def _has_ended(helper: _Helper, *, seconds: float) -> bool:
    return bool(select.select([helper.handle], [], [], seconds)[0])


def _end(helper: _Helper) -> None:
    """Kill it, and the child of its own that it has while it waits for us."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(helper.pid), signal.SIGKILL)
    _has_ended(helper, seconds=START_TIME)


def _last_words(helper: _Helper) -> str:
    """What it said last; it is ended for that."""
    _end(helper)
    os.set_blocking(helper.errors, False)
    try:
        said = os.read(helper.errors, 1 << 16).decode(errors="replace")
    except BlockingIOError:
        said = ""
    lines = [line.strip() for line in said.splitlines()]
    # Its own functions add that they failed, after the cause.
    told = [line for line in lines if line and not line.endswith(" failed") and not line.startswith("do_slirp")]
    return told[-1] if told else "it said nothing"


def let_go(link: Path) -> None:
    """End a helper that still waits for its connection, because who started it was killed just then.

    The connection is what it waits for; after that it finds its lifeline cut.
    """
    with contextlib.suppress(OSError):
        connect(link, kind=socket.SOCK_SEQPACKET).close()
    link.unlink(missing_ok=True)


def helper_of(control: Path) -> int | None:
    """The process that listens there; None when it has ended."""
    return slirp.listener(control)


def publish(control: Path, port: PortSpec, *, restrict: bool) -> None:
    """Publish a port now. Raises `AlreadyExists` when the helper can't have it, `EngineFailed`."""
    with _answering():
        slirp.add(control, GUEST, port)
    if port.protocol == "udp":
        try:
            _guard_again(control, published(control), restrict=restrict)
        except EngineFailed:
            with _answering():
                slirp.remove(control, GUEST, port)
            raise


def unpublish(control: Path, port: PortSpec, *, restrict: bool) -> None:
    """Take a port back, if it is published. Connections that stand go on. Raises `EngineFailed`."""
    if helper_of(control) is None:
        # Its ports went with it.
        return
    if port.protocol == "udp":
        place = (port.protocol, port.host_address, port.host_port)
        kept = [each for each in published(control) if (each.protocol, each.host_address, each.host_port) != place]
        _guard_again(control, kept, restrict=restrict)
    with _answering():
        slirp.remove(control, GUEST, port)


def _guard_again(control: Path, ports: Sequence[PortSpec], *, restrict: bool) -> None:
    """Let the guest answer on the ports that are published now: of UDP a frame alone doesn't tell that it answers."""
    pid = helper_of(control)
    if pid is None:
        raise EngineFailed("the network's helper has ended", next_step="Restart the VM: `atoll restart`.")
    frame_filter.guard(pid, restrict=restrict, udp_ports=_of_udp(ports))


def _of_udp(ports: Sequence[PortSpec]) -> list[int]:
    return [port.guest_port for port in ports if port.protocol == "udp"]


def published(control: Path) -> list[PortSpec]:
    """The ports that are published. Raises `EngineFailed`."""
    with _answering():
        return [port for _, port in slirp.published(control)]


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineFailed(
            "the network's helper doesn't answer", str(error), "Restart the VM: `atoll restart`."
        ) from error
