"""What `ip`, nft and dnsmasq are told for a network, as text. Pure: golden files check it."""

import socket
from collections.abc import Mapping, Sequence

from atoll.host.link_text import BRIDGE, INNER, PRIVATE, UPLINK, Port
from atoll.model.network import Attached, Impairment, Network
from atoll.model.subnets import LINK_LOCAL6, address6, gateway6_of

LEASE_TIME = "1h"
BURST = 128 * 1024
"""Bytes that pass at once on a slow cable: two packets of the largest kind that guests hand over."""


def links(network: Network) -> str:
    """For `ip -batch`: the bridge, with the network's own address. No VM may be a part of a spanning tree.

    Without a hardware address of its own the bridge has that of a tap, and another one when that goes.
    """
    prefix = network.subnet.partition("/")[2]
    mac = ":".join(["02", *(network.id[index : index + 2] for index in range(0, 10, 2))])
    own6 = f"addr add {gateway6_of(network.subnet6)}/64 dev {BRIDGE} nodad\n" if network.subnet6 else ""
    return f"""link set lo up
link add {BRIDGE} address {mac} type bridge stp_state 0 forward_delay 0 mcast_snooping 0
addr add {network.gateway}/{prefix} dev {BRIDGE}
{own6}link set {BRIDGE} up
"""


def rules(network: Network) -> str:
    """For nft: what may reach the network itself, and what may go through it.

    From VM to VM goes here only where somebody (Docker does) has loaded br_netfilter.
    """
    out6 = network.mode == "nat" and network.subnet6 is not None
    return f"""table inet atoll {{
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname {{ "lo", "{UPLINK}" }} accept
        iifname != "{BRIDGE}" drop
        ct state established,related accept
        meta l4proto {{ icmp, icmpv6 }} accept
        meta l4proto {{ tcp, udp }} th dport 53 accept
        udp dport 67 accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "{BRIDGE}" oifname "{BRIDGE}" accept
        iifname "{PRIVATE}*" oifname "{PRIVATE}*" accept
        iifname "{BRIDGE}" oifname "{UPLINK}" ip saddr {network.subnet} accept
        iifname "{UPLINK}" oifname "{BRIDGE}" ip daddr {network.subnet} accept
{_FORWARD6.format(subnet6=network.subnet6) if out6 else ""}    }}
{_LOOPBACK6 if out6 else ""}    chain out {{
        type nat hook postrouting priority srcnat;
        oifname "{UPLINK}" masquerade
    }}
}}
{guards([])}"""


_FORWARD6 = f'        iifname "{BRIDGE}" oifname "{UPLINK}" ip6 saddr {{subnet6}} accept\n'
_LOOPBACK6 = f"""    chain uplink {{
        type filter hook postrouting priority filter;
        oifname != "{UPLINK}" accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        ip6 daddr {{ ::/64, 64:ff9b::/104, 64:ff9b::7f00:0/104, fd00::/64, fe80::/10, ff00::/8 }} drop
    }}
"""
"""Slirp connects to whatever address it is told, also to this computer's loopback: as ::1, as an IPv4 address written
as an IPv6 one, and as any address of its own subnet, fd00::/64, or link.
"""


def guards(
    ports: Sequence[Port],
    impairments: Sequence[Impairment] = (),
    limits: Mapping[str, int] | None = None,
    *,
    relayed: Sequence[Port] = (),
) -> str:
    """For nft: the table that lets out of each tap only what its card may say. It takes the place of the one before.

    What isn't ARP, IPv4 or, on a network that has it, IPv6 isn't let through. A guest can't answer for DHCP, be a
    router, or say who another address belongs to. Cables that work badly do so here, too, and
    cards that have a limit, by their hardware addresses, have it here. `relayed` are the taps of cards that are on a
    bridge of their own, with a relay's tap in their place on the network's.
    """
    guarded = (*ports, *relayed)
    macs = ", ".join(f'"{port.tap}" . {port.mac}' for port in guarded)
    addresses = ", ".join(f'"{port.tap}" . {port.mac} . {port.address}' for port in guarded)
    sets6, rules6 = _guards6([port for port in guarded if port.address6])
    return f"""table bridge atoll
delete table bridge atoll
table bridge atoll {{
    set macs {{
        type ifname . ether_addr
        {f"elements = {{ {macs} }}" if macs else ""}
    }}
    set addresses {{
        type ifname . ether_addr . ipv4_addr
        {f"elements = {{ {addresses} }}" if addresses else ""}
    }}
{sets6}    chain from_guests {{
        type filter hook prerouting priority -300; policy drop;
        iifname "{INNER}*" accept
        iifname . ether saddr != @macs drop
        ether type arp iifname . arp saddr ether . arp saddr ip @addresses accept
        ether type ip udp sport 67 drop
        ether type ip ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
        ether type ip iifname . ether saddr . ip saddr @addresses accept
{rules6}    }}
{impaired(ports, impairments, limits or {})}}}
"""


def _guards6(ports: Sequence[Port]) -> tuple[str, str]:
    """The sets and the rules for those that speak IPv6. Addresses are asked for, and told, in bodies of ICMP."""
    own = [(port, each) for port in ports for each in (address6(LINK_LOCAL6, port.mac), port.address6)]
    if not own:
        return "", ""
    addresses = ", ".join(f'"{port.tap}" . {port.mac} . {each}' for port, each in own)
    targets = ", ".join(f'"{port.tap}" . 0x{socket.inet_pton(socket.AF_INET6, each).hex()}' for port, each in own)
    sets = f"""    set addresses6 {{
        type ifname . ether_addr . ipv6_addr
        elements = {{ {addresses} }}
    }}
    set targets6 {{
        typeof iifname . @th,64,128
        elements = {{ {targets} }}
    }}
"""
    rules = """        icmpv6 type { nd-router-advert, nd-redirect } drop
        ether type ip6 udp sport 547 drop
        icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @targets6 drop
        ip6 saddr :: icmpv6 type nd-neighbor-solicit iifname . @th,64,128 @targets6 accept
        ip6 saddr :: icmpv6 type nd-router-solicit accept
        ether type ip6 iifname . ether saddr . ip6 saddr @addresses6 accept
"""
    return sets, rules


def impaired(ports: Sequence[Port], impairments: Sequence[Impairment], limits: Mapping[str, int]) -> str:
    """Chains for what is lost on the way, before the guards and behind the bridge; nothing when nothing is."""
    taps: dict[str, list[str]] = {}
    for port in ports:
        taps.setdefault(port.mac, []).append(port.tap)
    both = [_slow(port.tap, limits[port.mac]) for port in ports if limits.get(port.mac)]
    cuts: list[str] = []
    for each in impairments:
        for tap in taps.get(each.mac, ()):
            others = [other for mac in each.cut_from for other in taps.get(mac, ())]
            cuts += [f'"{a}" . "{b}"' for other in others for a, b in ((tap, other), (other, tap))]
            if each.loss:
                both.append(f'name "{tap}" numgen random mod 10000 < {round(each.loss * 100)} drop')
            if each.rate:
                both.append(_slow(tap, each.rate))
    chains = [("to_network", "prerouting", -310, [f"iif{rule}" for rule in both])]
    chains += [("to_guests", "postrouting", 0, [f"oif{rule}" for rule in both])]
    if cuts:
        chains += [("between", "forward", 0, [f"iifname . oifname {{ {', '.join(sorted(set(cuts)))} }} drop"])]
    return "".join(
        f"    chain {name} {{\n        type filter hook {hook} priority {priority};\n"
        + "".join(f"        {rule}\n" for rule in rules)
        + "    }\n"
        for name, hook, priority, rules in chains
        if rules
    )


def _slow(tap: str, rate: int) -> str:
    burst = max(BURST, rate // 10)
    return f'name "{tap}" limit rate over {rate} bytes/second burst {burst} bytes drop'


_BOTH = f"""user=
group=
interface={BRIDGE}
bind-interfaces
"""


def dns(network: Network, *, hosts: str, upstream: str | None) -> str:
    """For the dnsmasq that knows names. `upstream` knows those of the world; names of the network never go there.

    Without one, whoever asks for another name is refused, and so asks the next server that he has.
    """
    world = f"domain-needed\nserver={upstream}\n" if upstream else ""
    return f"{_BOTH}no-hosts\nno-resolv\naddn-hosts={hosts}\nlocal=/{network.domain}/\n{world}"


def dhcp(network: Network, *, leases: str) -> str:
    """For the dnsmasq that gives each card its address. A private network has no way out to tell of.

    It answers to all on the network, which needs no privilege.
    """
    return f"""{_BOTH}port=0
quiet-dhcp
dhcp-broadcast
no-ping
leasefile-ro
dhcp-authoritative
dhcp-range={network.subnet.partition("/")[0]},static,{_mask(network)},{LEASE_TIME}
dhcp-hostsfile={leases}
domain={network.domain}
dhcp-option=option:dns-server,{network.gateway}
dhcp-option=option:domain-search,{network.domain}
{"dhcp-option=option:router" if network.mode == "private" else ""}
{_router6(network) if network.subnet6 else ""}"""


def _router6(network: Network) -> str:
    """Guests make their addresses of this prefix. Where no way leads out by it, the router is nobody's default."""
    assert network.subnet6 is not None
    return f"""enable-ra
ra-param={BRIDGE},60,{1800 if network.mode == "nat" else 0}
dhcp-range={network.subnet6.partition("/")[0]},ra-only,64,infinite
"""


def _mask(network: Network) -> str:
    bits = 0xFFFFFFFF << (32 - int(network.subnet.partition("/")[2])) & 0xFFFFFFFF
    return ".".join(str(bits >> shift & 0xFF) for shift in (24, 16, 8, 0))


def resolver(network: Network) -> str:
    """For resolv.conf(5)."""
    return f"search {network.domain}\nnameserver {network.gateway}\n"


def name_switch(here: str) -> str:
    """This computer's nsswitch.conf(5), but that names are asked for by DNS."""
    return "".join(
        "hosts: files dns\n" if line.startswith("hosts:") else line for line in here.splitlines(keepends=True)
    )


def hosts(network: Network, attached: Sequence[Attached]) -> str:
    """For dnsmasq's DNS: each VM by its name and by that with the domain."""
    return "".join(
        f"{address} {each.vm} {each.vm}.{network.domain}\n"
        for each in attached
        for address in (each.address, each.address6)
        if address
    )


def leases(attached: Sequence[Attached]) -> str:
    """For dnsmasq's DHCP: nobody else gets an address."""
    return "".join(f"{each.mac},{each.address}\n" for each in attached)
