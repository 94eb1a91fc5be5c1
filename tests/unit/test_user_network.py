"""The helper of a user-mode network, real, with the test in the place of QEMU and its guest."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers import frames
from tests.helpers.ports import free_port
from tests.helpers.root import only_root

from atoll.errors import AlreadyExists, EngineFailed, MissingTool, Unsupported
from atoll.host import descriptors, facts, frame_filter, helper_jail, kernel, process, user_network
from atoll.host.user_network import Link, command, helper_of, open_link
from atoll.model.launch import UserNetwork
from atoll.model.spec import PortSpec

UNKNOWN_USER = 54321
MOMENT = 0.3


@pytest.fixture
def network() -> Iterator[UserNetwork]:
    # Pytest's own folders are closed to the user that some of these tests become.
    with tempfile.TemporaryDirectory(prefix="atoll-test-") as folder:
        yield UserNetwork(name="nic-net0", link=f"{folder}/net0.net/link", control=f"{folder}/net0.net/control")


@contextlib.contextmanager
def opened(network: UserNetwork) -> Iterator[Link]:
    link = open_link(network)
    link.frames.settimeout(5)
    pid = helper_of(Path(network.control))
    assert pid is not None
    try:
        link.frames.send(frames.hello())
        link.frames.recv(1 << 16)
        yield link
    finally:
        link.close()
        assert gone(pid)


def gone(pid: int, *, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while facts.identity_of(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.002)
    return facts.identity_of(pid) is None


def listens(path: Path) -> bool:
    """The flags of proc_net_unix(5): 10000 for a socket that accepts connections."""
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(words[-1].endswith(path.name) and words[3] == "00010000" for words in sockets)


def server(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    listening.settimeout(MOMENT)
    return listening


def is_reached(listening: socket.socket, link: Link, make: Callable[[int], bytes]) -> bool:
    """Whether a guest's frame, for the port that it is made for, opens a connection to the server."""
    link.frames.send(make(listening.getsockname()[1]))
    try:
        listening.accept()[0].close()
    except TimeoutError:
        return False
    return True


def own_address() -> str:
    """An address of this host that isn't its loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent.
            probe.connect(("203.0.113.1", 9))
        except OSError:
            pytest.skip("this host has no address but its loopback")
        return str(probe.getsockname()[0])


LOOPBACK: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "by its name of slirp": ("127.0.0.1", lambda port: frames.segment("10.0.2.2", port)),
    "by broadcast": ("127.0.0.1", lambda port: frames.segment("255.255.255.255", port)),
    "named": ("127.0.0.1", lambda port: frames.segment("127.0.0.1", port)),
    "named, behind options": ("127.0.0.1", lambda port: frames.segment("127.0.0.1", port, options=b"\x01" * 4)),
    "another of its addresses": ("127.0.0.9", lambda port: frames.segment("127.0.0.9", port)),
    "unspecified": ("127.0.0.1", lambda port: frames.segment("0.0.0.0", port)),
    "of IPv6": ("::1", lambda port: frames.segment6("::1", port)),
    "of IPv6, unspecified": ("::1", lambda port: frames.segment6("::", port)),
    "mapped into IPv6": ("127.0.0.1", lambda port: frames.segment6("::ffff:127.0.0.1", port)),
}
CLOSED_BY_SLIRP_ITSELF = {"of IPv6, unspecified"}


@pytest.mark.parametrize("way", LOOPBACK)
def test_a_guest_reaches_the_hosts_loopback_in_no_way(network: UserNetwork, way: str) -> None:
    address, make = LOOPBACK[way]
    with opened(network) as link, server(address) as listening:
        assert not is_reached(listening, link, make)


@pytest.mark.parametrize("way", sorted(set(LOOPBACK) - CLOSED_BY_SLIRP_ITSELF))
def test_without_the_filter_it_would(network: UserNetwork, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would prove nothing."""
    monkeypatch.setattr(frame_filter, "guard", lambda *_, **__: None)
    address, make = LOOPBACK[way]
    with opened(network) as link, server(address) as listening:
        assert is_reached(listening, link, make)


def test_a_guest_reaches_the_hosts_other_addresses(network: UserNetwork) -> None:
    address = own_address()
    with opened(network) as link, server(address) as listening:
        assert is_reached(listening, link, lambda port: frames.segment(address, port))
        assert link.weaker == "" or not kernel.user_namespaces().usable


def test_a_restricted_one_reaches_nothing_and_is_reached(network: UserNetwork) -> None:
    address, port = own_address(), PortSpec(host_port=free_port(), guest_port=80)
    with opened(replace(network, restrict=True, ports=(port,))) as link, server(address) as listening:
        assert not is_reached(listening, link, lambda port: frames.segment(address, port))
        assert not is_reached(listening, link, lambda port: frames.segment("127.0.0.1", port))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind((address, 0))
            receiver.settimeout(MOMENT)
            link.frames.send(frames.datagram(address, receiver.getsockname()[1], b"out"))
            with pytest.raises(TimeoutError):
                receiver.recv(100)
        assert knocks(link, port.host_port)


def test_a_restricted_one_needs_an_address_that_nobody_may_use(
    network: UserNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_network, "NOWHERE", "127.0.0.1")
    with pytest.raises(Unsupported, match="without a way out"):
        open_link(replace(network, restrict=True))


def knocks(link: Link, host_port: int) -> bool:
    """Whether who connects to the published port comes to the guest."""
    deadline = time.monotonic() + 2
    with socket.create_connection(("127.0.0.1", host_port), timeout=2):
        while time.monotonic() < deadline:
            link.frames.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(TimeoutError):
                if frames.tcp_flags(link.frames.recv(1 << 16)) == frames.SYN:
                    return True
    return False


def test_ports_are_published_at_the_start_and_later_and_taken_back(network: UserNetwork) -> None:
    first, second = (PortSpec(host_port=free_port(), guest_port=number) for number in (80, 81))
    datagrams = PortSpec(host_port=first.host_port, guest_port=53, protocol="udp")
    control = Path(network.control)
    with opened(replace(network, ports=(first,))) as link:
        assert knocks(link, first.host_port)
        user_network.publish(control, second, restrict=False)
        user_network.publish(control, datagrams, restrict=False)
        assert user_network.published(control) == [first, second, datagrams]
        with pytest.raises(AlreadyExists, match=f"port {second.host_port} on 127.0.0.1 can't be published"):
            user_network.publish(control, second, restrict=False)
        user_network.unpublish(control, first, restrict=False)
        user_network.unpublish(control, first, restrict=False)
        assert user_network.published(control) == [second, datagrams]
        with pytest.raises(ConnectionRefusedError):
            knocks(link, first.host_port)
        assert knocks(link, second.host_port)


@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_datagrams_to_a_published_port_are_answered(network: UserNetwork, restrict: bool, later: bool) -> None:
    port = PortSpec(host_port=free_port(), guest_port=53, protocol="udp")
    control = Path(network.control)
    with opened(replace(network, restrict=restrict, ports=() if later else (port,))) as link:
        if later:
            user_network.publish(control, port, restrict=restrict)
        assert is_answered(link, port)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
            # A service of the host's, at a port that no client has, nor another of these tests.
            service.bind(("127.0.0.1", 1717 + 2 * restrict + later))
            service.settimeout(MOMENT)
            for source in (port.guest_port, 4000):
                link.frames.send(frames.datagram("10.0.2.2", service.getsockname()[1], source=source))
            with pytest.raises(TimeoutError):
                service.recv(100)
        user_network.unpublish(control, port, restrict=restrict)
        assert user_network.published(control) == []


def is_answered(link: Link, port: PortSpec) -> bool:
    """Whether somebody on this computer who asks the guest by UDP gets its answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.connect((port.host_address, port.host_port))
        client.send(b"question")
        while (question := link.frames.recv(1 << 16))[12:14] != b"\x08\x00" or question[23] != frames.UDP:
            pass
        asker, its_port = socket.inet_ntoa(question[26:30]), int.from_bytes(question[34:36], "big")
        link.frames.send(frames.datagram(asker, its_port, b"answer", source=port.guest_port))
        return client.recv(100) == b"answer"


def test_many_may_call_a_published_port_at_once(network: UserNetwork) -> None:
    port = PortSpec(host_port=free_port(), guest_port=80)
    with opened(network) as link, contextlib.ExitStack() as stack:
        before = len(list(Path("/proc/self/fd").iterdir()))
        user_network.publish(Path(network.control), port, restrict=False)
        assert len(list(Path("/proc/self/fd").iterdir())) == before, "what was copied to be looked at is closed"
        pid = helper_of(Path(network.control))
        assert pid is not None and link
        os.kill(pid, signal.SIGSTOP)
        stack.callback(os.kill, pid, signal.SIGCONT)
        for _ in range(50):
            # The kernel itself takes them meanwhile; more than wait at most it would let try again for seconds.
            stack.enter_context(socket.create_connection((port.host_address, port.host_port), timeout=0.9))


def test_a_port_that_is_taken_keeps_it_from_starting_and_nothing_is_left(network: UserNetwork) -> None:
    with server("127.0.0.1") as listening:
        port = PortSpec(host_port=listening.getsockname()[1], guest_port=80)
        with pytest.raises(AlreadyExists, match="can't be published"):
            open_link(replace(network, ports=(port,)))
    assert helper_of(Path(network.control)) is None
    with pytest.raises(EngineFailed, match="doesn't answer"):
        user_network.publish(Path(network.control), port, restrict=False)


@only_root("a port below 1024 is taken")
def test_root_publishes_low_ports(network: UserNetwork) -> None:
    port = PortSpec(host_port=1023, guest_port=80, host_address="127.0.0.7")
    with opened(replace(network, ports=(port,))):
        socket.create_connection(("127.0.0.7", 1023), timeout=2).close()


def test_it_hears_us_while_the_guest_takes_no_frames(network: UserNetwork) -> None:
    port = PortSpec(host_port=free_port(), guest_port=80)
    with opened(replace(network, ports=(port,))), contextlib.ExitStack() as stack:
        for _ in range(300):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(("127.0.0.1", port.host_port))
        assert user_network.published(Path(network.control)) == [port]


def test_who_holds_the_lifeline_keeps_it_alive(network: UserNetwork) -> None:
    link = open_link(network)
    engine = subprocess.Popen(["sleep", "100"], pass_fds=(link.frames.fileno(), link.lifeline))
    link.close()
    pid = helper_of(Path(network.control))
    assert pid is not None and not gone(pid, seconds=MOMENT)
    engine.kill()
    engine.wait()
    assert gone(pid)


def test_one_whose_starter_was_killed_before_it_had_connected_is_let_go(
    network: UserNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []

    def killed(helper: user_network._Helper, path: Path) -> socket.socket:
        while not listens(path):
            time.sleep(0.001)
        waiting.append(helper.pid)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(user_network, "_connected", killed)
        patch.setattr(user_network, "_end", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            open_link(network)
    (pid,) = waiting
    assert not gone(pid, seconds=MOMENT)
    user_network.let_go(Path(network.link))
    assert gone(pid)
    assert not Path(network.link).exists()


def test_a_long_path_is_no_hindrance(network: UserNetwork) -> None:
    folder = Path(network.link).parent / ("x" * 100) / ("y" * 100)
    far = replace(network, link=str(folder / "link"), control=str(folder / "control"))
    with opened(far):
        assert user_network.published(Path(far.control)) == []


def test_where_it_can_t_have_a_root_of_its_own_it_runs_without_and_that_is_told(
    network: UserNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = kernel.Feature(usable=False, why="Operation not permitted")
    monkeypatch.setattr(helper_jail, "usable_namespaces", lambda: refused)
    with opened(network) as link, server("127.0.0.1") as listening:
        assert link.weaker == "the network of net0: it has no root of its own: Operation not permitted"
        assert not is_reached(listening, link, lambda port: frames.segment("127.0.0.1", port))


def test_one_that_can_t_be_guarded_isn_t_used(network: UserNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, most: int) -> Iterator[int]:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(descriptors, "copies", refuse)
    with pytest.raises(EngineFailed, match="can't be made safe"):
        open_link(network)
    assert helper_of(Path(network.control)) is None


def test_one_that_ends_at_its_start_says_why(network: UserNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_network, "command", lambda *_, **__: (process.find("slirp4netns"), "--mtu=no such number"))
    with pytest.raises(EngineFailed, match="helper ended at its start: MTU must be"):
        open_link(network)


def test_a_computer_without_it_is_told_what_to_install(network: UserNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.shutil, "which", lambda *_, **__: None)
    with pytest.raises(MissingTool, match="sudo apt-get install slirp4netns"):
        open_link(network)


def test_its_command_line(network: UserNetwork) -> None:
    program, *words = command(network, lifeline=5, ready=6)
    assert program.endswith("/slirp4netns")
    ours = "--target-type=bess --exit-fd=5 --ready-fd=6 --api-socket=control --enable-seccomp --enable-ipv6 link"
    assert words == ours.split()
    _, *words = command(replace(network, restrict=True), lifeline=5, ready=6)
    assert words == ours.replace("--enable-ipv6", "--outbound-addr=240.0.0.1 --disable-dns").split()


@only_root("it becomes another user; as an ordinary one the tests above are its own")
def test_an_ordinary_user_s_is_as_tight(network: UserNetwork) -> None:
    folder, root = Path(network.link).parents[1], Path(__file__).parents[2]
    os.chown(folder, UNKNOWN_USER, UNKNOWN_USER)
    tests = "a_guest_reaches or restricted or ports_are_published or lifeline or root_of_its_own or datagrams"
    words = ["setpriv", f"--reuid={UNKNOWN_USER}", f"--regid={UNKNOWN_USER}", "--clear-groups", sys.executable, "-m"]
    words += ["pytest", "-q", "-p", "no:cacheprovider", "-k", tests, f"--basetemp={folder}/tmp", __file__]
    finished = subprocess.run(
        words,
        cwd=root,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    if b"PermissionError" in finished.stderr and not finished.stdout:
        pytest.skip("this checkout is in a folder that only root may enter")
    assert finished.returncode == 0, finished.stdout.decode() + finished.stderr.decode()
    assert b"passed" in finished.stdout and b"skipped" not in finished.stdout, finished.stdout.decode()
