"""IPv6 out of networks of mode nat, with real guests: a namespace of the test's plays this computer, which has an IPv6
address that others can reach, and a loopback that guests can't.
"""

import os
import secrets
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.helpers import frames
from tests.helpers.command import ATOLL
from tests.helpers.guest_net import program
from tests.helpers.images import adopt_cached
from tests.vm.test_net_bridge import Run, runner

from atoll.layout import Layout

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

OUTER, SERVER = "2001:db8:7::1", 9000
LISTENERS = """
import selectors, socket, sys
found = selectors.DefaultSelector()
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "127.0.0.1")):
        link = socket.socket(family, kind)
        if family == socket.AF_INET6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        link.bind((address, 9000))
        kind == socket.SOCK_STREAM and link.listen(50)
        found.register(link, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in found.select():
        if key.fileobj.type == socket.SOCK_STREAM:
            client, peer = key.fileobj.accept()
            print("tcp", client.getsockname()[0], flush=True)
            client.close()
        else:
            content, peer = key.fileobj.recvfrom(2048)
            print("udp", content.decode(), flush=True)
            key.fileobj.sendto(content, peer)
"""
"""All that listens on this computer: on every IPv6 address, and on the loopback. It says who was connected to."""
LOOPBACK = [
    "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1", "::ffff:0.0.0.0", "64:ff9b::127.0.0.1", "64:ff9b::0.0.0.0",
    "fd00::1", "fd00::2", "fd00::3", "fd00::7", "fe80::2", "fe80::1", "ff02::1", "ff01::1",
]  # fmt: skip
"""Whatever may mean this computer's own, to Slirp or to the kernel."""


@pytest.fixture
def computer(tmp_path: Path) -> Iterator[tuple[Run, Callable[[], list[str]]]]:
    """Runs a program on it; and what its listeners have heard."""
    if os.geteuid() != 0:
        pytest.skip("only root may make namespaces for computers")
    name = f"atoll-test-{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    run, log = runner(name), tmp_path / "heard"
    server = None
    try:
        links = f"link set lo up\nlink add nic0 type bridge\nlink set nic0 up\naddr add {OUTER}/64 dev nic0 nodad\n"
        assert run("ip", "-batch", "-", text=links).code == 0
        with log.open("wb") as output:
            server = subprocess.Popen(["ip", "netns", "exec", name, "python3", "-c", LISTENERS], stdout=output)
        until = time.monotonic() + 30
        while "ready" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.1)
        yield run, lambda: log.read_text().splitlines()[1:]
    finally:
        if server is not None:
            server.terminate()
            server.wait()
        subprocess.run(["ip", "netns", "delete", name], check=True)


def forged(mac: str, router: str, source: str, to: str) -> list[bytes]:
    """The opening of a connection, and a datagram that names whom it is for."""
    syn = struct.pack(">HHIIBBHHH", 4000 + secrets.randbelow(20000), SERVER, 1000, 0, 0x50, frames.SYN, 65535, 0, 0)
    said = to.encode()
    udp = struct.pack(">HHHH", 4000, SERVER, 8 + len(said), 0) + said
    return [
        frames.between6(mac, router, (source, to), frames.UDP, udp),
        frames.between6(mac, router, (source, to), frames.TCP, syn),
    ]


async def test_guests_get_out_and_not_to_the_loopback(
    computer: tuple[Run, Callable[[], list[str]]], layout: Layout, tmp_path: Path
) -> None:
    run, heard = computer
    await adopt_cached("tiny", layout)

    def atoll(*words: str | Path) -> str:
        ended = run(*ATOLL, *words)
        assert ended.code == 0, ended.err
        return ended.out.strip()

    def guest(script: str) -> str:
        return atoll("exec", "web", "--", "sh", "-c", script)

    atoll("net", "create", "wan", "--mode", "nat", "--ipv6")
    try:
        atoll("run", "tiny", "--name", "web", "--network", "wan", "-m", "96MiB", "-q")
        (tmp_path / "guest_net").write_bytes(program())
        (tmp_path / "guest_net").chmod(0o755)
        atoll("cp", tmp_path / "guest_net", "web:/usr/bin/guest_net")
        guest("for i in $(seq 150); do ip -6 route | grep -q default && exit; sleep 0.1; done; exit 1")
        ask = f"for i in 1 2 3 4 5; do guest_net ask {OUTER} {SERVER} && exit; done; exit 1"
        assert guest(ask) == "hello"
        guest(f"nc -w 3 {OUTER} {SERVER} </dev/null")
        assert heard()[-2:] == ["udp hello", f"tcp {OUTER}"]

        source = guest("ip -6 addr show dev eth0 scope global | grep -o 'fd[^/]*'")
        mac = guest("cat /sys/class/net/eth0/address")
        router = guest("ip -6 neigh show | grep -o 'lladdr [^ ]*' | head -1").removeprefix("lladdr ")

        def send(*targets: str) -> list[str]:
            """What is heard of frames that no kernel would send."""
            before = len(heard())
            said = [frame for to in targets for frame in forged(mac, router, source, to)]
            (tmp_path / "said").write_text("".join(f"{frame.hex()}\n" for frame in said))
            atoll("cp", tmp_path / "said", "web:/said")
            guest("guest_net send eth0 1 </said; sleep 3")
            return heard()[before:]

        assert sorted(send(OUTER)) == [f"tcp {OUTER}", f"udp {OUTER}"], "such frames do get out"
        assert send(*LOOPBACK) == []
        # By a program of this computer's in the network.
        assert run(*ATOLL, "net", "exec", "wan", "--", tmp_path / "guest_net", "ask", "fd00::2", str(SERVER)).code != 0
        assert guest(ask) == "hello"

        # It is the filter that does it: without, Slirp reaches the loopback.
        atoll("net", "exec", "wan", "--", "nft", "flush", "chain", "inet", "atoll", "uplink")
        assert "tcp ::1" in send(*LOOPBACK)
    finally:
        run(*ATOLL, "rm", "-f", "web")
        run(*ATOLL, "net", "rm", "--force", "wan")
