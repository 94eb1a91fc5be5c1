"""How long some megabytes take through networks: between guests, from a guest to its computer, and into one."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

from bench import raw
from bench.harness import Case, Goal
from bench.ours import NAME, Atoll
from bench.wire import Wire

MEBIBYTES = 16
PORT = 8123
PEER = "bench-peer"
NETWORK = "bench-net"
SERVE = (
    f"mkdir -p /www; [ -s /www/file ] || dd if=/dev/zero of=/www/file bs=1M count={MEBIBYTES} 2>/dev/null;"
    f" netstat -tln | grep -q :{PORT} || httpd -p {PORT} -h /www"
)


def own_address() -> str:
    """One of this computer's that isn't its loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.1", 9))
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def sink(address: str) -> Iterator[int]:
    """A server that reads what comes to its end, and says so; its port."""
    with socket.create_server((address, 0)) as server:

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
def cases(atoll: Atoll, hand: raw.ByHand, repetitions: int) -> Iterator[list[Case]]:
    """With the guests up that they need: NAME and PEER on a shared network and published ports, and one by hand."""
    with contextlib.ExitStack() as stack:
        address = own_address()
        port = stack.enter_context(sink(address))
        send = f"dd if=/dev/zero bs=1M count={MEBIBYTES} 2>/dev/null | nc {address} {port}"
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

        between = f"wget -q -O /dev/null http://{NAME}:{PORT}/file"
        yield [
            Case(
                f"{MEBIBYTES} MiB from guest to guest", repetitions, {"atoll": lambda: _in_guest(atoll, PEER, between)}
            ),
            Case(
                f"{MEBIBYTES} MiB from guest to host, user-mode network",
                repetitions,
                {"atoll": lambda: _in_guest(atoll, NAME, send), "raw": lambda: _by_agent(agent, send)},
                (Goal("raw", 1.5),),
            ),
            Case(f"{MEBIBYTES} MiB through a published port", repetitions, {"atoll": fetched}),
        ]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _in_guest(atoll: Atoll, name: str, script: str) -> float:
    """Seconds of a line of shell, by the guest's clock, without what `exec` takes."""
    timed = f"read a _ </proc/uptime; {script} >/dev/null || exit 1; read b _ </proc/uptime; echo $a $b"
    return _between(atoll.run("exec", name, "--", "sh", "-c", timed))


def _by_agent(agent: Wire, script: str) -> float:
    timed = f"read a _ </proc/uptime; {script} >/dev/null || exit 1; read b _ </proc/uptime; echo $a $b"
    asked = agent.ask("guest-exec", path="sh", arg=["-c", timed], **{"capture-output": True})
    while not (status := agent.ask("guest-exec-status", pid=asked["pid"]))["exited"]:
        time.sleep(0.02)
    if status["exitcode"] != 0:
        raise RuntimeError(json.dumps(status))
    return _between(base64.b64decode(status["out-data"]).decode())


def _between(text: str) -> float:
    began, ended = map(float, text.split())
    return ended - began
