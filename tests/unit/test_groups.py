"""Security groups without a kernel: rules as text, and what nft is told of them."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some
from msgspec.structs import replace
from tests.unit.test_network_texts import CARDS, CARDS6, LAB, LAB6, PORTS, PORTS6

from atoll.cli.options import parse_nics
from atoll.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from atoll.host import group_text
from atoll.host.link_text import Port
from atoll.layout import Layout
from atoll.model.groups import Group, Rule, parse_rule, parse_rules
from atoll.model.network import Members
from atoll.model.requests import NicRequest
from atoll.model.units import format_rate
from atoll.operations import resolve_nics
from atoll.platform.local import LocalHost
from atoll.store.sqlite import SqliteRecords

port = some.integers(1, 65535)
ports = some.lists(some.tuples(port, port).map(lambda pair: (min(pair), max(pair))), max_size=4).map(tuple)
key = some.from_regex(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,20}", fullmatch=True)
value = some.from_regex(r"[!-~]{0,20}", fullmatch=True)
peer = some.one_of(
    some.just("any"),
    some.ip_addresses(v=4).map(lambda address: f"{address}/32"),
    some.ip_addresses(v=6).map(lambda address: f"{address}/128"),
    key.map(lambda name: f"label:{name}"),
    some.tuples(key, value).map(lambda pair: f"label:{pair[0]}={pair[1]}"),
    some.from_regex(r"[a-z0-9]{1,10}", fullmatch=True).map(lambda name: f"group:{name}"),
)
directions = some.sampled_from(["in", "out"])
rules = some.one_of(
    some.builds(
        Rule,
        action=some.sampled_from(["allow", "deny"]),
        direction=directions,
        protocol=some.sampled_from(["tcp", "udp"]),
        ports=ports,
        peer=peer,
    ),
    some.builds(
        Rule,
        action=some.sampled_from(["allow", "deny"]),
        direction=directions,
        protocol=some.sampled_from(["any", "icmp", "tcp"]),
        peer=peer,
    ),
)


@given(rules)
def test_a_rule_is_read_as_it_is_written(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule


@given(some.one_of(some.text(max_size=40), some.lists(some.sampled_from(
    ["allow", "deny", "in", "out", "tcp", "udp", "any", "icmp", "from", "to", "80", "1-", "0", "label:", "10.0.0.0/8"]
), max_size=7).map(" ".join)))  # fmt: skip
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = parse_rule(text)
    except InvalidInput as error:
        assert error.next_step
    else:
        assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("allow in tcp 80,8000-8100 from any", "allow in tcp 80,8000-8100 from any"),
        ("deny out udp 53 to 10.0.0.0/8", "deny out udp 53 to 10.0.0.0/8"),
        ("allow in tcp 5432 from label:role=web", "allow in tcp 5432 from label:role=web"),
        ("  allow   in any", "allow in any from any"),
        ("deny out any to 192.0.2.1", "deny out any to 192.0.2.1/32"),
    ],
)
def test_rules_are_written_in_one_form(text: str, written: str) -> None:
    assert str(parse_rule(text)) == written


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "starts with allow or deny"),
        ("allow through tcp", "in or out"),
        ("allow in sctp", "a protocol: any, tcp, udp, icmp"),
        ("allow in tcp 0 from any", "'0' is no port"),
        ("allow in tcp 90-80 from any", "'90-80' is no port"),
        ("allow in tcp 80; from any", "is no list of ports"),
        ("allow in icmp 8 from any", "only tcp and udp have ports"),
        ("allow in tcp 80 to any", "'from' and one peer"),
        ("deny out any to", "'to' and one peer"),
        ("allow in any from 10.0.0.1/8", "has host bits set"),
        ("allow in any from label:", "names no label"),
        ("allow in any from group:A", "can't be the name of a security group"),
        ("allow in any from web", "neither any, a subnet"),
    ],
)
def test_what_is_no_rule(text: str, why: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_rule(text)
    assert why in raised.value.text


WEB = Group(
    name="web",
    created_at=0,
    rules=parse_rules(
        [
            "deny in tcp 80 from 192.0.2.0/24", "allow in tcp 80,8000-8100 from any", "allow in udp from group:db",
            "allow in icmp from label:role=db", "allow in any from label:gone", "deny out any to 10.0.0.0/8",
            "deny out any to fd00::/8",
        ]
    ),
)  # fmt: skip
DB = replace(CARDS[0], groups=("db",), labels={"role": "db"})
WWW = replace(CARDS[1], groups=("web", "removed"), limit=125000)
MEMBERS = Members(
    network=LAB,
    attached=(DB, WWW),
    groups=(WEB, Group(name="db", created_at=0)),
)


def test_what_nft_is_told() -> None:
    there = b'{"nftables": [{"set": {"name": "own_told"}}, {"chain": {"name": "in_told"}}, {"set": {"name": "own_t0"}},'
    there += b' {"chain": {"name": "to_guests", "hook": "postrouting"}}]}'
    text = group_text.groups(MEMBERS, PORTS, there)
    assert_golden(text, "groups.txt")


def test_what_nft_is_told_with_ipv6() -> None:
    members = replace(MEMBERS, network=LAB6, attached=(replace(DB, groups=(), address6=CARDS6[0].address6), WWW))
    assert_golden(group_text.groups(members, PORTS6), "groups6.txt")


def test_what_nft_is_told_on_a_bridge_of_the_computer() -> None:
    """Cards without a group, too, have rules; and VMs are known by their cables, not by addresses."""
    office = replace(LAB, mode="bridge", bridge="br7", subnet="", gateway="", domain="")
    cards = (replace(DB, groups=(), address=""), replace(WWW, address=""))
    unknown = Port(tap="t9", mac="52:54:00:00:00:09", address="")
    members = replace(MEMBERS, network=office, attached=cards)
    assert_golden(group_text.groups(members, [*PORTS, unknown], table="atoll-groups"), "groups-office.txt")


def assert_golden(text: str, name: str) -> None:
    golden = Path(__file__).parent / "golden" / name
    if os.environ.get("ATOLL_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_nft_is_told_nothing_where_no_card_has_a_group() -> None:
    members = Members(network=LAB, attached=tuple(CARDS), groups=(WEB,))
    assert group_text.groups(members, PORTS) == "table bridge groups\ndelete table bridge groups\n"


def test_groups_and_limits_on_the_command_line() -> None:
    assert parse_nics(["lab,group=web+db,limit=10Mbit"]) == (
        NicRequest(network="lab", groups=("web", "db"), limit=1250000),
    )
    assert [format_rate(rate) for rate in (0, 1250000, 8000, 187500, 125000000)] == [
        "none", "10Mbit", "64kbit", "1.5Mbit", "1Gbit"
    ]  # fmt: skip
    nic = resolve_nics.card(NicRequest(network="lab", groups=("web", "db", "web"), limit=8000), [LAB], [])
    assert (nic.groups, nic.limit) == (("web", "db"), 8000)
    for request, why in (
        (NicRequest(groups=("web",)), "no groups and no limit"),
        (NicRequest(network="lab", limit=1), "no card can have that limit"),
        (NicRequest(network="lab", groups=("a b",)), "can't be the name"),
    ):
        with pytest.raises(InvalidInput, match=why):
            resolve_nics.card(request, [LAB], [])


@pytest.mark.parametrize("name", ["", "B B", "Web", "-a", "a-", "x" * 33, "a,b", "a+b", "web\n"])
async def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    layout = Layout(data=tmp_path / "data", cache=tmp_path / "cache", run=tmp_path / "run")
    async with LocalHost(layout) as host:
        with pytest.raises(InvalidInput, match="can't be the name of a security group"):
            await host.networks.groups.create(name)
        assert await host.networks.groups.ls() == []


async def test_groups_are_made_changed_and_removed(tmp_path: Path) -> None:
    layout = Layout(data=tmp_path / "data", cache=tmp_path / "cache", run=tmp_path / "run")
    async with LocalHost(layout) as host:
        groups = host.networks.groups
        await groups.create("web", ["allow in any from group:web"])
        with pytest.raises(AlreadyExists, match="a security group 'web' already"):
            await groups.create("web")
        assert (await groups.set("web", ["deny in udp 53"])).rules == ("deny in udp 53 from any",)
        with pytest.raises(NotFound, match="no security group 'db'"):
            await groups.show("db")
        await groups.rm("web")
        assert await groups.ls() == []


def test_groups_in_use_stay(tmp_path: Path) -> None:
    from tests.unit.test_network_texts import vm

    records = SqliteRecords(tmp_path / "atoll.db")
    records.add_network(LAB)
    with pytest.raises(NotFound, match="no security group 'db'"):
        records.put_group(WEB)
    assert records.groups() == []
    records.put_group(MEMBERS.groups[1])
    records.put_group(WEB)
    web = vm("web", "52:54:00:00:00:01", "10.213.0.2")
    nics = (replace(web.spec.nics[0], groups=("web",), limit=8000),)
    records.add_vm(replace(web, spec=replace(web.spec, nics=nics), labels={"role": "front"}))
    (card,) = records.attached()[LAB.id]
    assert (card.groups, card.limit, card.labels) == (("web",), 8000, {"role": "front"})
    with pytest.raises(WrongState, match="web has it"):
        records.remove_group("web")
    with pytest.raises(WrongState, match="the group web has it"):
        records.remove_group("db")
    records.remove_vm("web")
    records.remove_group("web")
    records.remove_group("db")
    assert records.groups() == []
    records.close()
