"""Mode bridge, with real guests: a namespace of the test's plays a computer that has a bridge and a DHCP server."""

import json
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.helpers.command import ATOLL, Ended
from tests.helpers.images import adopt_cached
from tests.helpers.root import need_root

from atoll.layout import Layout

pytestmark = [pytest.mark.vm, pytest.mark.timeout(200)]

Run = Callable[..., Ended]


@pytest.fixture
def computer(tmp_path: Path) -> Iterator[Run]:
    """Runs a program on it."""
    need_root("bridges and networks of mode bridge are made")
    name = f"atoll-test-{secrets.token_hex(4)}"

    def run(*words: str | Path, text: str = "") -> Ended:
        done = subprocess.run(
            ["ip", "netns", "exec", name, *words], input=text.encode(), capture_output=True, timeout=150, check=False
        )
        return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    subprocess.run(["ip", "netns", "add", name], check=True)
    server = None
    try:
        links = "link set lo up\nlink add br0 type bridge\n"
        # Its own card, whose hardware address the bridge takes.
        links += "link add nic0 type veth peer name nic1\nlink set nic0 master br0 mtu 1400 up\nlink set nic1 up\n"
        links += "addr add 10.77.0.1/24 dev br0\nlink set br0 up\n"
        assert run("ip", "-batch", "-", text=links).code == 0
        options = [
            "--no-resolv",
            "--interface=br0",
            "--bind-interfaces",
            "--dhcp-range=10.77.0.10,10.77.0.99",
            "--port=0",
        ]
        options += [
            f"--pid-file={tmp_path / 'pid'}",
            f"--dhcp-leasefile={tmp_path / 'leases'}",
            "-d",
            "-C",
            "/dev/null",
        ]
        server = subprocess.Popen(
            ["ip", "netns", "exec", name, "dnsmasq", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        yield run
    finally:
        if server is not None:
            server.terminate()
            server.wait()
        subprocess.run(["ip", "netns", "delete", name], check=True)


def taps(computer: Run) -> list[str]:
    return [
        link["ifname"] for link in json.loads(computer("ip", "-j", "link", "show", "master", "br0", "type", "tun").out)
    ]


SPOOF = """
ping -c 1 -W 3 10.77.0.1 >/dev/null && echo honest passed
ip addr add 10.77.0.200/24 dev eth0; ping -c 1 -W 2 -I 10.77.0.200 10.77.0.1 >/dev/null && echo address passed
ip link set eth0 down; ip link set eth0 address 52:54:00:66:66:66; ip link set eth0 up; sleep 0.5
ping -c 2 -W 1 10.77.0.1 >/dev/null && echo mac passed; true
"""
UP = "for i in $(seq 150); do ip addr | grep -q 10.77.0 && exit 0; sleep 0.1; done; exit 1"


async def test_guests_are_on_the_network_of_the_computer(computer: Run, layout: Layout) -> None:
    await adopt_cached("tiny", layout)

    def atoll(*words: str) -> str:
        ended = computer(*ATOLL, *words)
        assert ended.code == 0, ended.err
        return ended.out

    def guest(vm: str, script: str) -> str:
        return atoll("exec", vm, "--", "sh", "-c", script).strip()

    missing = computer(*ATOLL, "net", "create", "office", "--mode", "bridge", "--bridge", "br9")
    assert "this computer has no bridge 'br9': there is br0" in missing.err and atoll("net", "ls", "-q") == ""
    assert "needs one" in computer(*ATOLL, "net", "create", "office", "--mode", "bridge").err
    wrong = computer(*ATOLL, "net", "create", "x", "--mode", "bridge", "--bridge", "br0", "--subnet", "10.0.0.0/24")
    assert "neither a subnet nor a domain" in wrong.err
    assert atoll("net", "create", "office", "--mode", "bridge", "--bridge", "br0") == "office\n"
    own = computer("ip", "-br", "link", "show", "br0").out.split()[2]
    rules = computer("nft", "list", "ruleset").out
    refused = computer(*ATOLL, "create", "tiny", "--name", "no", "--network", "office", "-p", "8080:80")
    assert refused.code != 0 and "reached by its own address" in refused.err

    limited = computer(*ATOLL, "create", "tiny", "--name", "no", "--network", "office,limit=10Mbit")
    assert "no groups and no limit" in limited.err

    try:
        for name, network in (("web", "office"), ("db", "office,address=10.77.0.150")):
            atoll("run", "tiny", "--name", name, "-m", "96MiB", "--network", network, "-q")
        for name in ("web", "db"):
            guest(name, UP)
        address = guest("web", "ip -o -4 addr show eth0 | tr -s ' ' | cut -d' ' -f4").partition("/")[0]
        assert address.startswith("10.77.0.")
        assert computer("ping", "-c", "1", "-W", "5", address).code == 0 or guest("web", "ping -c 1 -W 5 10.77.0.1")
        state = (
            computer("ip", "-br", "link", "show", "br0").out.split()[2],
            "mtu 1400" in computer("ip", "link", "show", "br0").out,
        )
        assert state == (own, True), "the bridge is as it was"
        assert "10.77.0.150" in atoll("net", "show", "office") and "Bridge: br0" in atoll("net", "show", "office")
        assert '"packets_sent"' in atoll("top", "--once", "--format", "json", "web")

        # A copy has a hardware address of its own, and asks for an address.
        atoll("fork", "web", "--name", "copy", "-q")
        guest(
            "copy", f"for i in $(seq 150); do ip addr | grep 10.77.0 | grep -qv {address}/ && exit 0; sleep 0.1; done"
        )
        guest("copy", f"ping -c 1 -W 5 {address}")
        assert len(taps(computer)) == 3
        assert "can't be impaired" in computer(*ATOLL, "net", "impair", "web", "--loss", "1%").err
        assert "Run the program as it is" in computer(*ATOLL, "net", "exec", "office", "--", "true").err

        # Without an address any may be used, with one that alone; the hardware address always holds.
        assert guest("web", SPOOF).splitlines() == ["honest passed", "address passed"]
        guest("db", "killall udhcpc; ip addr flush dev eth0; ip addr add 10.77.0.150/24 dev eth0")
        assert guest("db", SPOOF) == "honest passed"

        atoll("stop", "-f", "web", "db")
        assert len(taps(computer)) == 1
        atoll("stop", "-f", "copy")
        assert taps(computer) == [] and computer("nft", "list", "ruleset").out == rules, "nothing of ours is left"
        atoll("start", "web")
        computer("nft", "add", "table", "inet", "of_others")
        atoll("net", "rm", "--force", "office")
        assert taps(computer) == []
        assert computer("nft", "list", "ruleset").out.split() == ["table", "inet", "of_others", "{", "}"]
    finally:
        for name in ("web", "db", "copy"):
            computer(*ATOLL, "rm", "-f", name)
        computer(*ATOLL, "net", "rm", "--force", "office")
