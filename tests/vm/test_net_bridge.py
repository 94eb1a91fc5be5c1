"""Mode bridge, with real guests: a namespace of the test's plays a computer that has a bridge and a DHCP server, and
another one a stranger's computer on the same wire.
"""

import json
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from tests.helpers import frames
from tests.helpers.command import ATOLL, Ended
from tests.helpers.guest_net import program
from tests.helpers.images import adopt_cached
from tests.helpers.root import need_root

from atoll.layout import Layout

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

Run = Callable[..., Ended]


def runner(namespace: str) -> Run:
    def run(*words: str | Path, text: str = "") -> Ended:
        argv = ["ip", "netns", "exec", namespace, *words]
        done = subprocess.run(argv, input=text.encode(), capture_output=True, timeout=150, check=False)
        return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    return run


@pytest.fixture
def computer(tmp_path: Path) -> Iterator[Run]:
    """Runs a program on it."""
    need_root("bridges and networks of mode bridge are made")
    name = f"atoll-test-{secrets.token_hex(4)}"
    run = runner(name)
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


@pytest.fixture
def stranger(computer: Run, tmp_path: Path) -> Iterator[Run]:
    """Runs a program on it. It has a web server, one that sends UDP packets back, and the program `guest_net`."""
    name = f"atoll-test-{secrets.token_hex(4)}"
    run = runner(name)
    (tmp_path / "index.html").write_text("served\n")
    tool = tmp_path / "guest_net"
    tool.write_bytes(program())
    tool.chmod(0o755)
    servers: list[subprocess.Popen[bytes]] = []
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        assert computer("ip", "link", "set", "nic1", "netns", name).code == 0
        links = "link set lo up\naddr add 10.77.0.2/24 dev nic1\naddr add fd77::2/64 dev nic1 nodad\n"
        links += "link set nic1 mtu 1400 up\n"
        assert run("ip", "-batch", "-", text=links).code == 0
        for words in (["python3", "-m", "http.server", "--bind", "::", "80"], [str(tool), "echo", "9000"]):
            silent = subprocess.DEVNULL
            argv = ["ip", "netns", "exec", name, *words]
            servers.append(subprocess.Popen(argv, cwd=tmp_path, stdout=silent, stderr=silent))
        yield run
    finally:
        for server in servers:
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

    try:
        for name, network in (("web", "office"), ("db", "office,address=10.77.0.150")):
            atoll("run", "tiny", "--name", name, "-m", "96MiB", "--network", network, "-q")
        for name in ("web", "db"):
            guest(name, UP)
        address = guest("web", "ip -o -4 addr show eth0 | tr -s ' ' | cut -d' ' -f4").partition("/")[0]
        assert address.startswith("10.77.0.")
        guest("web", "ping -c 1 -W 5 10.77.0.1")
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


class Office:
    """VMs on the bridge, and who reaches whom."""

    def __init__(self, computer: Run, stranger: Run, tool: Path) -> None:
        self.computer, self.stranger, self.tool = computer, stranger, tool
        self.addresses: dict[str, str] = {}

    def atoll(self, *words: str | Path) -> str:
        ended = self.computer(*ATOLL, *words)
        assert ended.code == 0, ended.err
        return ended.out

    def sh(self, vm: str, script: str) -> str:
        return self.computer(*ATOLL, "exec", vm, "--", "sh", "-c", script).out.strip()

    def run(self, vm: str, number: int, *options: str) -> None:
        """With a web server on the ports 80 and 81, and one that sends UDP packets back."""
        address = self.addresses[vm] = f"10.77.0.{number}"
        network = ",".join(["office", f"address={address}", *options])
        self.atoll("run", "tiny", "--name", vm, "-m", "96MiB", "--network", network, "-q")
        self.atoll("cp", self.tool, f"{vm}:/usr/bin/guest_net")
        self.sh(vm, "killall udhcpc; ip link set eth0 mtu 1400; ip addr flush dev eth0 scope global")
        self.sh(vm, f"ip addr add {address}/24 dev eth0; ip addr add fd77::{number}/64 dev eth0")
        self.sh(vm, "mkdir -p /www; echo served >/www/index.html; for port in 80 81; do httpd -p $port -h /www; done")
        self.sh(vm, "guest_net echo 9000 >/dev/null 2>&1 &")

    def answers(self, run: Run, address: str) -> str:
        """What of a computer reaches a stranger of this computer: `ping 80 81 udp`."""
        script = f"""
            ping -c 1 -W 2 {address} >/dev/null && echo ping
            for port in 80 81; do python3 -c "if True:
                import urllib.request
                print(urllib.request.urlopen('http://{address}:$port/', timeout=2) and $port)"
            done
            {self.tool} ask {address} 9000 >/dev/null && echo udp"""
        return " ".join(run("sh", "-c", script).out.split())

    def reached(self, vm: str, address: str) -> str:
        """What of a computer reaches a VM: `ping large 80 udp`."""
        script = f"""
            ping -c 1 -W 2 {address} >/dev/null && echo ping
            ping -c 1 -W 2 -s 4000 {address} >/dev/null && echo large
            printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 5 nc -w 2 {address} 80 | grep -qE 'served|Server' && echo 80
            guest_net ask {address} 9000 >/dev/null && echo udp; true"""
        return " ".join(self.sh(vm, script).split())

    def mac(self, vm: str) -> str:
        return self.sh(vm, "cat /sys/class/net/eth0/address")

    def hears(self, vm: str, speak: Callable[[], object]) -> list[bytes]:
        """What arrives at a VM's card while somebody speaks."""
        self.sh(vm, "guest_net hear eth0 5 >/heard 2>&1 &")
        time.sleep(1)
        speak()
        return [bytes.fromhex(line) for line in self.sh(vm, "sleep 5; cat /heard").split()]


@pytest.fixture
async def office(computer: Run, stranger: Run, layout: Layout, tmp_path: Path) -> AsyncIterator[Office]:
    await adopt_cached("tiny", layout)
    made = Office(computer, stranger, tmp_path / "guest_net")
    made.atoll("net", "create", "office", "--mode", "bridge", "--bridge", "br0")
    try:
        yield made
    finally:
        for vm in made.addresses:
            computer(*ATOLL, "rm", "-f", vm)
        computer(*ATOLL, "net", "rm", "--force", "office")


@pytest.mark.slow
def test_strangers_reach_what_a_group_lets_in_and_nothing_else(office: Office) -> None:
    atoll, stranger, computer = office.atoll, office.stranger, office.computer
    atoll("net", "group", "create", "web", "--rule", "allow in tcp 80 from any")
    atoll("net", "group", "create", "db", "--rule", "allow in any from group:web", "--rule", "deny out udp to any")
    office.run("web", 150)
    office.run("peer", 151)
    office.run("db", 152, "group=db", "limit=100Mbit")
    web, db = office.addresses["web"], office.addresses["db"]

    # Without a group: what it asked for is answered, neighbours come in, strangers don't, nor does this computer.
    assert office.reached("web", "10.77.0.2") == office.reached("web", "fd77::2") == "ping large 80 udp"
    assert office.reached("web", "10.77.0.1").startswith("ping large")
    assert office.reached("peer", web) == office.reached("peer", "fd77::150") == "ping large 80 udp"
    for everybody in (stranger, computer):
        assert office.answers(everybody, web) == ""
    assert office.answers(stranger, "[fd77::150]") == ""
    # Somebody who says to be a neighbour is a stranger still.
    peer, mac = office.mac("peer"), office.mac("web")
    forged = frames.udp4(peer, mac, (office.addresses["peer"], 5), (web, 9000))
    honest = frames.arp_reply("02:00:00:00:00:02", mac, claimed="10.77.0.3", claimed_mac="02:00:00:00:00:02", to=web)
    said = f"{forged.hex()}\n{honest.hex()}\n"
    heard = office.hears("web", lambda: stranger(office.tool, "send", "nic1", "3", text=said))
    assert honest in heard and forged not in heard

    # With groups: by port, and by those who have a group.
    atoll("net", "set", "web", "--group", "web")
    assert office.answers(stranger, web) == office.answers(computer, web) == "80"
    assert office.answers(stranger, "[fd77::150]") == "80"
    assert office.reached("peer", web) == "80" and office.reached("web", "10.77.0.2") == "ping large 80 udp"
    assert office.reached("web", db) == "ping large 80 udp" and office.reached("peer", db) == ""
    assert office.answers(stranger, db) == ""
    assert office.reached("db", "10.77.0.2") == "ping large 80", "it may send no UDP"

    # What is changed holds at once; what was open, stays.
    atoll("net", "group", "set", "web", "--rule", "allow in udp 9000 from 10.77.0.2")
    assert office.answers(stranger, web) == "udp" and office.answers(computer, web) == ""
    rules = computer("nft", "list", "ruleset").out
    assert rules.count("limit rate over 12500 kbytes/second") == 2 or "12500000 bytes/second" in rules
    atoll("net", "set", "web", "--no-groups", "--limit", "0")
    assert office.answers(stranger, web) == "" and office.reached("peer", web) == "ping large 80 udp"


@pytest.mark.slow
def test_a_guest_is_nobody_elses_server_and_leaves_nothing(office: Office) -> None:
    atoll, stranger, computer = office.atoll, office.stranger, office.computer
    of_others = "table inet of_others {\n\tchain in {\n\t\ttype filter hook input priority 0; policy accept;\n\t}\n}\n"
    assert computer("nft", "-f", "-", text=of_others).code == 0
    rules = computer("nft", "list", "ruleset").out
    atoll("net", "group", "create", "open", "--rule", "allow in any from any")
    office.run("web", 150, "group=open")
    mac, all_nodes = office.mac("web"), "ff:ff:ff:ff:ff:ff"
    own6, own = "fe80::1", office.addresses["web"]
    honest = frames.udp4(mac, all_nodes, (own, 5), ("255.255.255.255", 9999))
    rogue = [
        frames.dhcp_ack(mac, all_nodes, server=own, address="10.77.0.66"),
        frames.router_advert(mac, own6, prefix="fd66::"),
        frames.redirect(mac, "33:33:00:00:00:01", own6, "ff02::1", target=own6, destination="fd77::2"),
        frames.udp6(mac, "33:33:00:00:00:01", (own6, 547), ("ff02::1", 546)),
        frames.tagged(frames.udp4(mac, all_nodes, (own, 5), ("255.255.255.255", 9998))),
        # A bridge that says to be the root of all bridges; and something that nobody has heard of.
        frames.between(mac, "01:80:c2:00:00:00", 39, b"\x42\x42\x03" + bytes(36)),
        frames.between(mac, all_nodes, 0x88B5, b"hello" * 10),
        frames.udp4(mac, all_nodes, ("10.77.0.99", 5), ("255.255.255.255", 9999)),
        frames.udp4("52:54:00:66:66:66", all_nodes, (own, 5), ("255.255.255.255", 9999)),
    ]
    said = "".join(f"{frame.hex()}\n" for frame in [*rogue, honest])
    (office.tool.parent / "said").write_text(said)
    atoll("cp", office.tool.parent / "said", "web:/said")
    office.sh("web", "(sleep 2; guest_net send eth0 3 </said) >/dev/null 2>&1 &")
    heard = {bytes.fromhex(line) for line in stranger(office.tool, "hear", "nic1", "8").out.split()}
    assert honest in heard and not heard & {*rogue, frames.untagged(rogue[4])}

    # Whoever flushes all rules takes ours; the next command there brings them back.
    computer("nft", "flush", "ruleset")
    computer("nft", "-f", "-", text=of_others)
    atoll("net", "group", "set", "open", "--rule", "allow in tcp 80 from any")
    assert office.answers(stranger, own) == "80"

    # One that powers itself off leaves nothing from when that is noticed.
    assert computer("nft", "list", "ruleset").out != rules
    office.sh("web", "poweroff")
    until = time.monotonic() + 60
    while taps(computer) and time.monotonic() < until:
        time.sleep(0.2)
    assert computer("nft", "list", "ruleset").out != rules
    assert "stopped" in atoll("ls")
    assert computer("nft", "list", "ruleset").out == rules
