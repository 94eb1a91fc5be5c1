"""Networks without a kernel: which names, subnets and addresses they may have, and what their programs are told.

To take over a change that is meant: `ATOLL_UPDATE_GOLDEN=1 ./dev test tests/unit/test_network_texts.py`, then read
the diff.
"""

import json
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from atoll.cli.options import parse_nics, parse_percent, parse_rate
from atoll.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from atoll.host import host_bridge, link_text, network_text
from atoll.host.link_text import Link, Port
from atoll.model import subnets
from atoll.model.network import Attached, Impairment, Members, Network
from atoll.model.requests import CreateRequest, NicRequest
from atoll.model.spec import NicSpec, PortSpec, VmSpec
from atoll.model.vm import Vm
from atoll.operations import resolve_nics
from atoll.store.sqlite import SqliteRecords

GOLDEN = Path(__file__).parent / "golden"
LAB = Network(
    id="1" * 32,
    name="lab",
    mode="private",
    subnet="10.213.0.0/24",
    gateway="10.213.0.1",
    domain="lab.atoll",
    created_at=0,
)
WAN = replace(LAB, id="2" * 32, name="wan", mode="nat", subnet="10.9.0.0/20", gateway="10.9.0.1", domain="w.example")
CARDS = [
    Attached(vm_id="a", vm="db", nic="net0", mac="52:54:00:00:00:01", address="10.213.0.2"),
    Attached(vm_id="b", vm="web", nic="net1", mac="52:54:00:00:00:02", address="10.213.0.3"),
]
LAB6 = replace(LAB, id="3" * 32, name="lab6", subnet6="fd5a:1:2:3::/64")
WAN6 = replace(WAN, id="4" * 32, name="wan6", subnet6="fd5a:1:2:3::/64")
CARDS6 = [replace(card, address6=subnets.address6("fd5a:1:2:3::/64", card.mac)) for card in CARDS]
PORTS = [Port(tap=f"t{number}", mac=card.mac, address=card.address) for number, card in enumerate(CARDS)]
CABLE = Link(name="t1", index=4, mac=PORTS[1].mac, address=PORTS[1].address)

IMPAIRED = Impairment(mac=CARDS[0].mac, loss=2.5, rate=1250000, cut_from=(CARDS[1].mac, "52:54:00:00:00:99"))


PORTS6 = [replace(port, address6=card.address6) for port, card in zip(PORTS, CARDS6, strict=True)]


def told(network: Network) -> dict[str, str]:
    cards, ports = (CARDS6, PORTS6) if network.subnet6 else (CARDS, PORTS)
    upstream = "198.19.255.3" if network.mode == "nat" else None
    return {
        "links": network_text.links(network),
        "rules": network_text.rules(network),
        "guards": network_text.guards(ports),
        "relayed": network_text.guards(ports[:1], relayed=ports[1:])
        + link_text.relayed_cable(CABLE, inner="i1", outer="r1", bridge_there=False)
        + link_text.plain_cables([CABLE], ["q1"]),
        "impaired": network_text.guards(ports, [IMPAIRED], {CARDS[1].mac: 8000}),
        "joined": link_text.joined(ports[0]),
        "dns": network_text.dns(network, hosts="/run/hosts", upstream=upstream),
        "dhcp": network_text.dhcp(network, leases="/run/leases"),
        "resolver": network_text.resolver(network) + network_text.name_switch("passwd: files\nhosts: resolve dns\n"),
        "hosts": network_text.hosts(network, cards),
        "leases": network_text.leases(CARDS),
    }


@pytest.mark.parametrize("network", [LAB, LAB6, WAN, WAN6], ids=lambda network: str(network.name))
def test_what_programs_are_told(network: Network) -> None:
    text = "".join(f"== {name}\n{content}" for name, content in told(network).items())
    golden = GOLDEN / f"network-{network.name}.txt"
    if os.environ.get("ATOLL_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_links_are_read_back() -> None:
    shown = b"""[{"ifname":"t0","ifindex":3,"master":"br0","ifalias":"52:54:00:00:00:01/10.213.0.2/"},
        {"ifname":"t1","ifindex":4,"master":"q1","ifalias":"52:54:00:00:00:02/10.213.0.3/fd5a:1:2:3:5054:ff:fe00:2"},
        {"ifname":"i1","ifindex":5,"master":"q1"},{"ifname":"x","ifindex":6}]"""
    links = link_text.links_of(shown)
    assert link_text.ports_of(links) == PORTS[:1]
    assert link_text.relayed_of(links) == PORTS6[1:]
    assert [link.name for link in links if not link.mac] == ["i1", "x"]
    assert link_text.links_of(b"") == []


def test_subnets_and_addresses() -> None:
    assert subnets.free_subnet([]) == "10.213.0.0/24"
    assert subnets.free_subnet(["10.213.0.0/23", "10.213.3.128/25", "192.0.2.0/24"]) == "10.213.2.0/24"
    with pytest.raises(InvalidInput, match="no free subnet"):
        subnets.free_subnet(["10.0.0.0/8"])
    assert subnets.gateway_of("10.9.0.0/20") == "10.9.0.1"
    assert subnets.overlapped("10.9.0.0/20", ["10.10.0.0/16", "10.9.8.0/24"]) == "10.9.8.0/24"

    assert subnets.free_address(LAB, set()) == "10.213.0.2"
    assert subnets.free_address(LAB, {"10.213.0.2", "10.213.0.4"}) == "10.213.0.3"
    with pytest.raises(AlreadyExists, match="is full"):
        subnets.free_address(LAB, {f"10.213.0.{number}" for number in range(255)})
    assert subnets.check_address(LAB, "10.213.0.254") == "10.213.0.254"


def test_ipv6_addresses() -> None:
    made = {subnets.new_subnet6() for _ in range(20)}
    assert len(made) == 20 and all(each.startswith("fd") and each.endswith("::/64") for each in made)
    assert subnets.gateway6_of("fd5a:1:2:3::/64") == "fd5a:1:2:3::1"
    assert subnets.address6("fd5a:1:2:3::/64", "52:54:00:12:34:56") == "fd5a:1:2:3:5054:ff:fe12:3456"
    assert subnets.address6(subnets.LINK_LOCAL6, "52:54:00:12:34:56") == "fe80::5054:ff:fe12:3456"


@pytest.mark.parametrize("address", ["10.213.0.0", "10.213.0.1", "10.213.0.255", "10.213.1.2", "web", "::1", ""])
def test_addresses_that_no_vm_can_have(address: str) -> None:
    with pytest.raises(InvalidInput):
        subnets.check_address(LAB, address)


@pytest.mark.parametrize(
    "subnet", ["10.0.0.0/8", "10.0.0.0/30", "10.0.0.1/24", "127.0.0.0/24", "224.0.0.0/24", "fd00::/64", "x", ""]
)
def test_subnets_that_cannot_be(subnet: str) -> None:
    with pytest.raises(InvalidInput):
        subnets.check_subnet(subnet)


@pytest.mark.parametrize("name", ["", "user", "none", "Lab", "a.b", "-a", "a-", "x" * 33, "a b", "lab\n"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InvalidInput):
        subnets.check_name(name)


@pytest.mark.parametrize("domain", ["", "a..b", ".a", "a.", "A", "a b", "a/b", "x" * 64])
def test_domains_that_cannot_be(domain: str) -> None:
    with pytest.raises(InvalidInput):
        subnets.check_domain(domain)


def test_networks_on_the_command_line() -> None:
    assert parse_nics(["lab", "user", "wan,mac=52:54:00:00:00:09,address=10.9.0.7"]) == (
        NicRequest(network="lab"),
        NicRequest(),
        NicRequest(network="wan", address="10.9.0.7", mac="52:54:00:00:00:09"),
    )
    with pytest.raises(InvalidInput, match="there is no 'ip'"):
        parse_nics(["lab,ip=10.9.0.7"])


def test_what_cables_do_wrong_on_the_command_line() -> None:
    assert (parse_percent("5%"), parse_percent("0.5"), parse_rate("10Mbit"), parse_rate("8")) == (5, 0.5, 1250000, 1)
    for parse, text in ((parse_percent, "much"), (parse_rate, "10 MB"), (parse_rate, "")):
        with pytest.raises(InvalidInput):
            parse(text)


def cards(*nics: NicRequest, **options: object) -> tuple[NicSpec, ...]:
    request = CreateRequest(nics=nics, **options)  # type: ignore[arg-type]
    return resolve_nics.with_nics(VmSpec(), request, [LAB, WAN]).nics


def test_cards() -> None:
    port = PortSpec(host_port=1, guest_port=2)
    lab, wan, own = cards(
        NicRequest(network="lab", address="10.213.0.9"), NicRequest(network="wan"), NicRequest(),
        ports=(port,), mac="52:54:00:00:00:0A",
    )  # fmt: skip
    assert (lab.name, lab.network, lab.address, lab.mac, lab.ports) == (
        "net0", LAB.id, "10.213.0.9", "52:54:00:00:00:0a", ()
    )  # fmt: skip
    assert (wan.name, wan.network, wan.address, wan.ports) == ("net1", WAN.id, None, (port,))
    assert (own.name, own.network, own.ports) == ("net2", None, ())
    with pytest.raises(AlreadyExists, match="one card on each"):
        cards(NicRequest(network="lab"), NicRequest(network="lab"))
    with pytest.raises(NotFound, match="no network 'lan'"):
        cards(NicRequest(network="lan"))
    with pytest.raises(InvalidInput, match="no way in"):
        cards(NicRequest(network="lab"), ports=(port,))
    with pytest.raises(InvalidInput, match="takes no address"):
        cards(NicRequest(address="10.0.0.1"))


def vm(name: str, mac: str, address: str | None, network: str = LAB.id) -> Vm:
    nic = NicSpec(name="net0", mac=mac, network=network, address=address)
    return Vm(id=name, name=name, image="", created_at=0, spec=VmSpec(nics=(nic,)))


def test_cards_on_a_bridge_of_the_computer_are_recorded_without_addresses(tmp_path: Path) -> None:
    records = SqliteRecords(tmp_path / "atoll.db")
    office = replace(LAB, name="office", mode="bridge", bridge="br7", subnet="", gateway="", domain="")
    records.add_network(office)
    records.add_vm(vm("web", "52:54:00:00:00:01", None))
    records.add_vm(vm("db", "52:54:00:00:00:02", None))
    records.add_vm(vm("fixed", "52:54:00:00:00:03", "192.0.2.9"))
    found = records.attached(office.id)[office.id]
    assert [(each.vm, each.address) for each in found] == [("db", ""), ("fixed", "192.0.2.9"), ("web", "")]
    with pytest.raises(AlreadyExists, match="52:54:00:00:00:02 is taken"):
        records.add_vm(vm("other", "52:54:00:00:00:02", "192.0.2.10"))
    assert subnets.check_address(office, "192.0.2.9") == "192.0.2.9"
    with pytest.raises(InvalidInput, match=r"no VM can have 127\.0\.0\.1"):
        subnets.check_address(office, "127.0.0.1")


def test_each_address_is_recorded_once(tmp_path: Path) -> None:
    records = SqliteRecords(tmp_path / "atoll.db")
    records.add_network(LAB)
    with pytest.raises(AlreadyExists, match="there is a network 'lab' already"):
        records.add_network(replace(WAN, name="lab"))
    records.add_vm(vm("web", "52:54:00:00:00:01", "10.213.0.2"))
    with pytest.raises(AlreadyExists, match=r"10\.213\.0\.2 is taken on 'lab': 'web' has it"):
        records.add_vm(vm("db", "52:54:00:00:00:02", "10.213.0.2"))
    with pytest.raises(AlreadyExists, match="52:54:00:00:00:01 is taken"):
        records.add_vm(vm("db", "52:54:00:00:00:01", "10.213.0.3"))
    with pytest.raises(NotFound, match="is gone"):
        records.add_vm(vm("db", "52:54:00:00:00:02", "10.213.0.3", network="x"))
    with pytest.raises(InvalidInput, match="has no address"):
        records.add_vm(vm("db", "52:54:00:00:00:02", None))
    assert [each.vm for each in records.attached(LAB.id)[LAB.id]] == ["web"]

    # The running machine's card, and the one that the next start has.
    web = vm("web", "52:54:00:00:00:01", "10.213.0.2")
    records.put_vm(replace(web, pending=vm("web", "52:54:00:00:00:01", "10.213.0.2").spec))
    with pytest.raises(WrongState, match="VMs have cards on it"):
        records.remove_network(LAB.id)
    records.remove_vm("web")
    assert records.attached() == {}
    records.remove_network(LAB.id)
    assert records.networks() == [] and records.network(LAB.id) is None
    records.close()


def test_guards_on_a_bridge_of_the_computer_speak_of_our_taps_only() -> None:
    free, fixed = Port(tap="at1", mac=CARDS[0].mac, address=""), Port(tap="at2", mac=CARDS[1].mac, address="192.0.2.9")
    office = replace(LAB, mode="bridge", bridge="br7", subnet="", gateway="", domain="")
    text = "".join(
        f"== {name}\n{content}"
        for name, content in {
            "guards": host_bridge.guards(office.id, [free, fixed], {fixed.mac: 125000}),
            "without": host_bridge.rules(Members(network=office), [], b""),
            "joined": host_bridge.joined(office, fixed, mtu=9000),
        }.items()
    )
    golden = GOLDEN / "network-office.txt"
    if os.environ.get("ATOLL_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    shown = [
        {"ifname": tap.tap, "ifalias": f"atoll-{office.id} {tap.mac} {tap.address}".strip()} for tap in (free, fixed)
    ]
    others = [{"ifname": "at3", "ifalias": f"atoll-{WAN.id} {free.mac} "}, {"ifname": "vnet0"}]
    assert host_bridge.taps_of(office.id, json.dumps([*shown, *others]).encode()) == [free, fixed]
