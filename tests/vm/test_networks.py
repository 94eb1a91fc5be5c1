"""Networks that VMs share, with real guests: names, addresses, ways in and out, and nothing left behind."""

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.helpers.faults import kill
from tests.helpers.machines import Factory, Machine
from tests.helpers.ports import free_port

from atoll.errors import AlreadyExists, InvalidInput, NotFound, Unsupported, WrongState
from atoll.host import namespace, slirp
from atoll.model.network import Network
from atoll.model.requests import ImpairRequest, NetworkRequest, NicRequest
from atoll.model.spec import NOWHERE, PortSpec

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SMALL = "96MiB"


def on(*networks: str) -> dict[str, object]:
    return {"memory": SMALL, "nics": tuple(NicRequest(network=each) for each in networks)}


def processes_of(network: Network) -> str:
    """What runs for a network: its holder, dnsmasq and the uplink name its id or its folder, or live in it."""
    said = subprocess.run(["pgrep", "-af", network.id], capture_output=True, check=False).stdout.decode()
    return "\n".join(line for line in said.splitlines() if "pgrep" not in line)


@pytest.fixture
async def hosts(factory: Factory) -> AsyncIterator[Factory]:
    """A factory whose networks go, too."""
    try:
        yield factory
    finally:
        for info in await factory.host.ls():
            await (await factory.host.get(info.vm.id)).rm(force=True)
        for each in await factory.host.networks.ls():
            await factory.host.networks.rm(each.network.name)
            assert processes_of(each.network) == ""
        assert not list((factory.layout.run / "networks").glob("*"))


async def address_of(vm: Machine, card: int = 0) -> str:
    """Its own, once DHCP has given it."""
    wanted = vm.record.spec.nics[card].address
    assert wanted is not None
    await vm.sh(f"for i in $(seq 100); do ip addr | grep -q {wanted}/ && exit 0; sleep 0.1; done; exit 1")
    return wanted


async def forgotten(vm: Machine, name: str) -> None:
    """Until the network doesn't know the name any more."""
    await vm.sh(f"for i in $(seq 50); do nslookup {name} >/dev/null 2>&1 || exit 0; sleep 0.1; done; exit 1")


@contextlib.contextmanager
def answering(address: str) -> Iterator[int]:
    """A TCP server of this computer's that says `hello`; its port."""
    with socket.create_server((address, 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    client.sendall(b"hello\n")
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def outer_address() -> str:
    """One that isn't loopback's; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this computer has no address")
        return str(probe.getsockname()[0])


async def reaches(vm: Machine, name: str) -> None:
    """By its name. On a busy computer an answer may come too late, and isn't asked for again by the guest's library."""
    await vm.sh(f"for i in 1 2 3 4; do ping -c 1 -W 5 {name} && exit 0; sleep 1; done; exit 1")


async def test_three_vms_find_each_other_by_name(hosts: Factory) -> None:
    lab = await hosts.host.networks.create("lab")
    await hosts.host.networks.create("other")
    web = await hosts.run("tiny", name="web", **on("lab"))
    db = await hosts.run("tiny", name="db", **on("lab"))
    cache = await hosts.run("tiny", name="cache", **on("lab", "other"))
    stranger = await hosts.run("tiny", name="stranger", **on("other"))
    for vm in (web, db, cache, stranger):
        await address_of(vm)
    await address_of(cache, 1)

    for name in ("db", "cache", "db.lab.atoll"):
        await reaches(web, name)
    await reaches(cache, "web")
    await reaches(cache, "stranger")
    assert "default" not in await web.sh("ip route"), "a private network leads nowhere"

    # A cable that works badly, while they run.
    await web.net_impair(ImpairRequest(cut_from=("db",)))
    assert (await web.exec(["ping", "-c", "1", "-W", "1", "db"])).exit_code != 0
    assert (await db.exec(["ping", "-c", "1", "-W", "1", "web"])).exit_code != 0
    await reaches(web, "cache")
    await db.net_impair(ImpairRequest(loss=20))
    said = await cache.sh(f"ping -c 40 -i 0.1 -W 1 {await address_of(db)}; true")
    assert "100% packet loss" not in said and " 0% packet loss" not in said
    await db.net_impair(ImpairRequest())
    await reaches(web, "db")
    with pytest.raises(InvalidInput, match="is on 2 networks"):
        await cache.net_impair(ImpairRequest(loss=1))

    # Another network: neither its names nor its addresses.
    hidden = (await stranger.exec(["ping", "-c", "1", "-W", "1", "web"])).exit_code
    assert hidden != 0
    assert (await stranger.exec(["ping", "-c", "1", "-W", "1", await address_of(web)])).exit_code != 0
    assert (await web.exec(["nslookup", "example.com"])).exit_code != 0

    # Names follow the machines.
    await db.rename("base")
    await reaches(web, "base")
    await forgotten(web, "db.lab.atoll")
    with pytest.raises(WrongState, match="base, cache, web are on it"):
        await hosts.host.networks.rm("lab")
    cache_s = await address_of(cache)
    await cache.rm(force=True)
    await forgotten(web, "cache.lab.atoll")
    late = await hosts.run("tiny", name="late", **on("lab"))
    assert await address_of(late) == cache_s, "it is free at once"
    await reaches(web, "late")

    # Whoever holds the namespace is killed: the next start brings the network up again.
    holder = namespace.holder_of(hosts.layout.network(lab.id))
    assert holder is not None
    kill(holder.pid)
    told = (await hosts.host.networks.show("lab")).troubles
    assert told[0] == "web runs without it: `atoll restart web` brings it up"
    await late.restart(force=True)
    told = (await hosts.host.networks.show("lab")).troubles
    assert told == tuple(f"{name} has no cable: `atoll restart {name}` gives it one" for name in ("web", "base"))
    for vm in (web, db):
        await vm.stop(force=True)
        await vm.start(wait=True)
        await address_of(vm)
    await reaches(web, "base")
    assert (await hosts.host.networks.show("lab")).troubles == ()


async def test_a_card_comes_and_goes_while_it_runs(hosts: Factory) -> None:
    await hosts.host.networks.create(NetworkRequest(name="lab", subnet="10.99.7.0/28", dns_domain="lab.example"))
    web = await hosts.run("tiny", name="web", **on("lab"))
    late = await hosts.run("tiny", name="late", memory=SMALL)
    nic, change = await late.net_attach(NicRequest(network="lab", address="10.99.7.9", mac="52:54:00:aa:bb:cc"))
    assert (nic.address, change.when) == ("10.99.7.9", "now")
    await address_of(late, 1)
    await reaches(web, "late.lab.example")
    with pytest.raises(AlreadyExists, match="is on the network 'lab' already"):
        await late.net_attach("lab")

    assert (await late.net_detach("lab")).when == "now"
    assert "52:54:00:aa:bb:cc" not in await late.sh("ip link")
    await forgotten(web, "late.lab.example")
    with pytest.raises(NotFound, match="isn't on the network"):
        await late.net_detach("lab")

    # Stopped: the same, from the next start on.
    await late.stop(force=True)
    await late.net_attach("lab")
    await late.start(wait=True)
    await address_of(late, 1)
    await reaches(web, "late")

    # A copy has addresses of its own.
    copy = hosts.machine(await late.clone("copy"))
    assert copy.record.spec.nics[1].address not in {late.record.spec.nics[1].address, web.record.spec.nics[0].address}
    assert copy.record.spec.nics[1].mac != late.record.spec.nics[1].mac

    # The guest holds a card that it was started with: it is cut off.
    await hosts.host.networks.rm("lab", force=True)
    assert (await web.exec(["ping", "-c", "1", "-W", "1", "10.99.7.1"])).exit_code != 0
    assert web.record.pending is not None and web.record.pending.nics == ()


SERVE = "mkdir -p /www && echo served > /www/index.html && httpd -p 80 -h /www"


async def test_nat_leads_out_and_published_ports_lead_in(hosts: Factory) -> None:
    wan = await hosts.host.networks.create(NetworkRequest(name="wan", mode="nat"))
    first, second = free_port(), free_port()
    web = await hosts.run("tiny", name="web", ports=(PortSpec(host_port=first, guest_port=80),), **on("wan"))
    await address_of(web)
    await web.sh(SERVE)
    outside = outer_address()
    with answering(outside) as port:
        assert await web.sh(f"nc -w 5 {outside} {port} </dev/null") == "hello"
    with answering("127.0.0.1") as port:
        assert "hello" not in (await web.exec(["nc", "-w", "1", "198.19.255.2", str(port)])).text, "loopback is shut"

    def fetched(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: client.recv(4096), b""))

    assert b"served" in fetched(first)
    await web.publish(PortSpec(host_port=second, guest_port=80))
    assert b"served" in fetched(second)
    with pytest.raises(AlreadyExists, match="'web'"):
        await hosts.create("tiny", name="other", ports=(PortSpec(host_port=second, guest_port=80),), **on("wan"))
    await web.unpublish(second)
    with pytest.raises(OSError):
        fetched(second)
    await web.suspend()
    with pytest.raises(ConnectionRefusedError):
        fetched(first)
    await web.resume()
    assert b"served" in fetched(first)
    await web.stop(force=True)
    with pytest.raises(OSError):
        fetched(first)

    # One that ends by itself: whoever looks first takes its ports back.
    await web.start(wait=True)
    await address_of(web)
    await web.sh(SERVE)
    assert b"served" in fetched(first)
    await web.sh("(sleep 0.2; poweroff -f) >/dev/null 2>&1 &")
    await web.wait("stopped", timeout=60)
    with pytest.raises(OSError):
        fetched(first)

    # The uplink is killed: it is told, and the next one has the ports of all that run.
    await web.start(wait=True)
    await address_of(web)
    await web.sh(SERVE)
    listening = slirp.listener(hosts.layout.network(wan.id).uplink)
    assert listening is not None
    kill(listening)
    (told,) = (await hosts.host.networks.show("wan")).troubles
    assert "its way out has ended" in told
    await hosts.host.networks.exec("wan", ["true"])
    assert b"served" in fetched(first)
    assert (await hosts.host.networks.show("wan")).troubles == ()

    await hosts.host.networks.create("lab")
    inside = await hosts.create("tiny", name="inside", **on("lab"))
    with pytest.raises(Unsupported, match="no way in"):
        await inside.publish(PortSpec(host_port=second, guest_port=80))


SPOOF = """
ip link set eth0 down; ip link set eth0 address 52:54:00:66:66:66; ip link set eth0 up
ping -c 2 -W 1 {peer} >/dev/null && echo mac passed
ip link set eth0 down; ip link set eth0 address {mac}; ip link set eth0 up
ip addr flush dev eth0; ip addr add {stolen}/24 dev eth0
ping -c 2 -W 1 {peer} >/dev/null && echo address passed
arping -U -c 2 -I eth0 {stolen} >/dev/null; arping -c 2 -w 3 -I eth0 {peer} >/dev/null && echo arp passed
ip addr flush dev eth0; ip addr add {own}/24 dev eth0
ping -c 2 -W 3 {peer} >/dev/null && echo honest passed
"""


async def test_a_guest_is_nobody_else(hosts: Factory) -> None:
    await hosts.host.networks.create("lab")
    bad = await hosts.run("tiny", name="bad", **on("lab"))
    peer = await hosts.run("tiny", name="peer", **on("lab"))
    own, mac = await address_of(bad), bad.record.spec.nics[0].mac
    await bad.sh("killall udhcpc; sleep 0.2; ip addr")
    script = SPOOF.format(peer=await address_of(peer), own=own, mac=mac, stolen="10.213.0.77")
    assert await bad.sh(f"ip addr add {own}/24 dev eth0 2>/dev/null; {script}") == "honest passed"
    assert "66:66:66" not in await peer.sh("cat /proc/net/arp") and "10.213.0.77" not in await peer.sh("arp -an")


async def test_copies_and_restored_machines_have_addresses_that_nobody_else_has(hosts: Factory) -> None:
    await hosts.host.networks.create("lab")
    web = await hosts.run("tiny", name="web", **on("lab"))
    await address_of(web)
    await web.snapshot("then")
    forks = [hosts.machine(vm) for vm in await web.fork(2, name="f{n}")]
    macs = [vm.record.spec.nics[0].mac for vm in (web, *forks)]
    assert len(set(macs)) == 3
    for vm, mac in zip(forks, macs[1:], strict=True):
        assert mac in await vm.sh("ip link show eth0")
        await address_of(vm)
        await vm.sh("ping -c 1 -W 5 web && udhcpc -n -q -i eth0 -s /bin/true")
    await web.sh("ping -c 1 -W 5 f1 && ping -c 1 -W 5 f2")
    await forks[0].sh("ping -c 1 -W 5 f2.lab.atoll")

    await web.restore("then")
    await forks[0].sh("ping -c 1 -W 5 web")
    await web.stop(force=True)
    for vm in forks:
        await vm.rm(force=True)
    await web.net_detach("lab")
    await hosts.host.networks.rm("lab")
    await web.restore("then")
    (nic,) = web.record.spec.nics
    assert nic.network == NOWHERE, "its network is gone, and it isn't let out instead"
    assert (await web.exec(["ping", "-c", "1", "-W", "1", "10.213.0.1"])).exit_code != 0


async def test_a_network_that_an_older_build_brought_up_can_be_removed(hosts: Factory) -> None:
    """Those had no folder of names."""
    network = await hosts.host.networks.create("lab")
    await hosts.host.networks.exec("lab", ["true"])
    paths = hosts.layout.network(network.id)
    shutil.rmtree(paths.names)
    await hosts.create("tiny", name="web", **on("lab"))
    shutil.rmtree(paths.names)
    await hosts.host.networks.rm("lab", force=True)
    assert await hosts.host.networks.ls() == [] and not paths.run.exists()
