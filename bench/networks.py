"""How long some megabytes, and a ping, take through networks: between guests, from one to its computer, into one."""

import asyncio
import base64
import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from atoll.host import namespace
from bench import libvirt, libvirt_network, raw
from bench.harness import Case, Goal, Measure
from bench.ours import NAME, Atoll
from bench.wire import Wire

MEBIBYTES = 16
PORT = 8123
PEER = "bench-peer"
NETWORK = "bench-net"
BY_HAND = ("bench-first", "bench-second")
"""Two VMs whose command lines are started by hand, on one bridge."""
PINGS = 20
HOST = "10.0.2.2"
"""The computer, to a guest on a user-mode network."""
SERVE = (
    f"mkdir -p /www; [ -s /www/file ] || dd if=/dev/zero of=/www/file bs=1M count={MEBIBYTES} 2>/dev/null;"
    f" netstat -tln | grep -q :{PORT} || httpd -p {PORT} -h /www"
)


@dataclass(frozen=True)
class Peer:
    """libvirt: a domain to copy, and the daemon that has a network namespace of its own."""

    domain: libvirt.Domain
    daemon: int


def own_address() -> str:
    """One of this computer's that isn't its loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.1", 9))
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def sink(server: socket.socket) -> Iterator[int]:
    """A server that reads what comes to its end, and says so; its port."""
    with server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    while client.recv(1 << 18):
                        pass
                    client.sendall(b"done\n")
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def bridged(atoll: Atoll, folder: Path) -> Iterator[Wire]:
    """The agent of the second of two guests by hand that have taps on a bridge, without any guards; the first one is
    10.99.0.1 and serves its file.
    """
    with contextlib.ExitStack() as stack:
        make = "ip link add br0 up type bridge forward_delay 0 && echo ready && exec sleep infinity"
        argv = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", make]
        space = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE))
        stack.callback(space.kill)
        assert space.stdout is not None
        if space.stdout.readline() != b"ready\n":
            raise RuntimeError("there is no namespace with a bridge")
        inside = ["nsenter", "--user", "--preserve-credentials", "--net", f"--target={space.pid}"]
        agents = []
        for number, name in enumerate(BY_HAND, start=1):
            atoll.run("create", "tiny", "--name", name, "--memory", "256MiB")
            stack.callback(atoll.run, "rm", "--force", name)
            with atoll.booted(name):
                pass  # its folders are made
            tap = namespace.open_tap(space.pid, f"t{number}")
            stack.callback(os.close, tap)
            subprocess.run([*inside, "ip", "link", "set", f"t{number}", "master", "br0", "up"], check=True)
            sockets = folder / name
            sockets.mkdir(parents=True)
            hand = asyncio.run(raw.by_hand(atoll.layout, name, sockets=sockets))
            vm = replace(hand, tap=tap)
            stack.enter_context(raw.going(vm))
            agent = stack.enter_context(Wire(vm.socket("agent")))
            agent.ask("guest-ping")
            # Nobody answers for DHCP; who asks for it would take the address away.
            pid = "/run/udhcpc.eth0"
            stop = f"until [ -s {pid} ]; do sleep 0.1; done; kill $(cat {pid}); while [ -e {pid} ]; do sleep 0.1; done"
            _by_agent(agent, f"{stop}; ip addr add 10.99.0.{number}/24 dev eth0")
            agents.append(agent)
        _by_agent(agents[0], SERVE)
        yield agents[1]


@contextlib.contextmanager
def cases(atoll: Atoll, hand: raw.ByHand, folder: Path, repetitions: int, *, peer: Peer | None) -> Iterator[list[Case]]:
    """With the guests up that they need: NAME and PEER on a shared network and published ports, those by hand, and
    libvirt's.
    """
    with contextlib.ExitStack() as stack:
        address = own_address()
        send = _sending(address, stack.enter_context(sink(socket.create_server((address, 0)))))
        atoll.run("net", "create", NETWORK)
        stack.callback(atoll.run, "net", "rm", "--force", NETWORK)
        atoll.run("create", "tiny", "--name", PEER, "--memory", "256MiB", "--network", NETWORK, "--network", "user")
        stack.callback(atoll.run, "rm", "--force", PEER)
        atoll.run("net", "attach", NAME, NETWORK)
        stack.enter_context(atoll.booted(NAME))
        stack.enter_context(atoll.booted(PEER))
        published = _free_port()
        atoll.run("port", "add", NAME, f"{published}:{PORT}")
        stack.callback(atoll.run, "port", "rm", NAME, str(published))
        atoll.run("exec", NAME, "--", "sh", "-c", SERVE)
        stack.enter_context(raw.going(hand))
        agent = stack.enter_context(Wire(hand.socket("agent")))
        agent.ask("guest-ping")

        def fetched() -> float:
            began = time.perf_counter()
            subprocess.run(
                ["wget", "-q", "-O", os.devnull, f"http://127.0.0.1:{published}/file"], check=True, timeout=300
            )
            return time.perf_counter() - began

        second = stack.enter_context(bridged(atoll, folder))
        between, by_hand = (f"wget -q -O /dev/null http://{host}:{PORT}/file" for host in (NAME, "10.99.0.1"))
        theirs = _of_libvirt(peer, folder, stack) if peer is not None else dict[str, dict[str, Measure]]()
        yield [
            Case(
                f"{MEBIBYTES} MiB from guest to guest",
                repetitions,
                {
                    "atoll": lambda: _in_guest(atoll, PEER, between),
                    "raw": lambda: _by_agent(second, by_hand),
                    **theirs.get("fetch", {}),
                },
                (Goal("raw", 1.2),),
            ),
            Case(
                "ping from guest to guest",
                repetitions,
                {
                    "atoll": lambda: _pinged(atoll, PEER, NAME),
                    "raw": lambda: _pinged_by_agent(second, "10.99.0.1"),
                    **theirs.get("ping", {}),
                },
                (Goal("raw", 1.2),),
            ),
            Case(
                "ping from guest to host, user-mode network",
                repetitions,
                {
                    "atoll": lambda: _pinged(atoll, PEER, HOST),
                    "raw": lambda: _pinged_by_agent(agent, HOST),
                    **theirs.get("ping host", {}),
                },
                (Goal("raw", 1.5),),
            ),
            Case(
                f"{MEBIBYTES} MiB from guest to host, user-mode network",
                repetitions,
                {
                    "atoll": lambda: _in_guest(atoll, NAME, send),
                    "raw": lambda: _by_agent(agent, send),
                    **theirs.get("send", {}),
                },
                (Goal("raw", 1.5),),
            ),
            Case(f"{MEBIBYTES} MiB through a published port", repetitions, {"atoll": fetched}),
        ]


def _of_libvirt(peer: Peer, folder: Path, stack: contextlib.ExitStack) -> dict[str, dict[str, Measure]]:
    """The same between two domains, and from one to the bridge that they are on."""
    first = stack.enter_context(libvirt_network.pair(peer.domain, folder / "libvirt"))
    gateway = libvirt_network.GATEWAY
    server = libvirt_network.inside(peer.daemon, lambda: socket.create_server((gateway, 0)))
    send = _sending(gateway, stack.enter_context(sink(server)))
    one, other = libvirt_network.PAIR
    libvirt.sh(one, SERVE)

    def timed(script: str) -> Measure:
        return lambda: _between(libvirt.sh(other, _timed(script)))

    def pinged(host: str) -> Measure:
        return lambda: _average(libvirt.sh(other, f"ping -q -c {PINGS} -i 0.1 {host}"))

    return {
        "fetch": {"virsh": timed(f"wget -q -O /dev/null http://{first}:{PORT}/file")},
        "ping": {"virsh": pinged(first)},
        "ping host": {"virsh": pinged(gateway)},
        "send": {"virsh": timed(send)},
    }


def _sending(address: str, port: int) -> str:
    return f"dd if=/dev/zero bs=1M count={MEBIBYTES} 2>/dev/null | nc {address} {port}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _timed(script: str) -> str:
    """A line of shell that tells when it began and ended, by the guest's clock."""
    return f"read a _ </proc/uptime; {script} >/dev/null || exit 1; read b _ </proc/uptime; echo $a $b"


def _in_guest(atoll: Atoll, name: str, script: str) -> float:
    """Seconds of a line of shell, by the guest's clock, without what `exec` takes."""
    return _between(atoll.run("exec", name, "--", "sh", "-c", _timed(script)))


def _by_agent(agent: Wire, script: str) -> float:
    return _between(_said(agent, _timed(script)))


def _said(agent: Wire, script: str) -> str:
    asked = agent.ask("guest-exec", path="sh", arg=["-c", script], **{"capture-output": True})
    while not (status := agent.ask("guest-exec-status", pid=asked["pid"]))["exited"]:
        time.sleep(0.02)
    if status["exitcode"] != 0:
        raise RuntimeError(json.dumps(status))
    return base64.b64decode(status.get("out-data", "")).decode()


def _pinged(atoll: Atoll, name: str, host: str) -> float:
    return _average(atoll.run("exec", name, "--", "ping", "-q", "-c", str(PINGS), "-i", "0.1", host))


def _pinged_by_agent(agent: Wire, host: str) -> float:
    return _average(_said(agent, f"ping -q -c {PINGS} -i 0.1 {host}"))


def _average(told: str) -> float:
    """Seconds, of `round-trip min/avg/max = 1.2/3.4/5.6 ms`."""
    return float(told.rpartition("= ")[2].split("/")[1]) / 1000


def _between(text: str) -> float:
    began, ended = map(float, text.split())
    return ended - began
