"""Names, subnets and addresses of networks: what they may be, and which is free. Pure."""

import ipaddress
import re
import secrets
from collections.abc import Collection, Iterable

from atoll.errors import AlreadyExists, InvalidInput
from atoll.model.names import shown
from atoll.model.network import RESERVED_NAMES, Network

OWN_DOMAIN = "atoll"
LINK_LOCAL6 = "fe80::/64"
POOL = ipaddress.IPv4Network("10.213.0.0/16")
"""Where subnets come from that nobody chose: seldom used by others."""
UPLINK = ipaddress.IPv4Network("198.19.255.0/24")
"""Between a network and its uplink. Of the range that is kept for measuring, so that it hides nobody's computer."""
LARGEST_PREFIX, SMALLEST_PREFIX = 29, 16
# Its first label is a part of host names.
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?", re.ASCII)
_DOMAIN = re.compile(r"(?=.{1,200}$)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_ONE_CARD = re.compile(r"(?!00(:00){5})[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


def gateway_of(subnet: str) -> str:
    return str(ipaddress.IPv4Network(subnet)[1])


def new_subnet6() -> str:
    """A unique local prefix, made by chance as RFC 4193 has it."""
    return str(ipaddress.IPv6Network((0xFD << 120 | secrets.randbits(56) << 64, 64)))


def gateway6_of(subnet6: str) -> str:
    return str(ipaddress.IPv6Network(subnet6)[1])


def address6(subnet6: str, mac: str) -> str:
    """The address that a guest makes of a prefix and its card's hardware address (RFC 4291, appendix A)."""
    first, *others = bytes.fromhex(mac.replace(":", ""))
    card = bytes([first ^ 2, *others[:2], 0xFF, 0xFE, *others[2:]])
    return str(ipaddress.IPv6Network(subnet6)[int.from_bytes(card)])


def _subnet(network: Network) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network(network.subnet)


def check_name(name: str) -> str:
    """The name itself, or `InvalidInput`."""
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise InvalidInput(
            f"{shown(name)} can't be the name of a network",
            "a name has up to 32 small letters (a-z), digits and '-', and 'user' and 'none' mean something else",
            "Choose another.",
        )
    return name


def check_domain(domain: str) -> str:
    if not _DOMAIN.fullmatch(domain):
        raise InvalidInput(f"{shown(domain)} isn't a domain name", next_step="Write it like lab.example.")
    return domain


def check_mac(mac: str) -> str:
    """In small letters. Raises `InvalidInput`."""
    # QEMU takes zeros for no address at all.
    if not _ONE_CARD.fullmatch(mac.lower()):
        raise InvalidInput(
            f"{shown(mac)} isn't a hardware address of one card", next_step="Write it like 52:54:00:12:34:56."
        )
    return mac.lower()


def check_subnet(text: str) -> str:
    """In its canonical form. Raises `InvalidInput`."""
    try:
        subnet = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise InvalidInput(f"{shown(text)} isn't a subnet", str(error), "Write it like 10.20.30.0/24.") from error
    if not SMALLEST_PREFIX <= subnet.prefixlen <= LARGEST_PREFIX:
        raise InvalidInput(f"the subnet {subnet} can't be", f"it has to be between /{SMALLEST_PREFIX} and /29")
    if subnet.is_loopback or subnet.is_multicast or subnet.is_link_local or subnet.is_unspecified:
        raise InvalidInput(f"the subnet {subnet} can't be", "its addresses mean something else to every computer")
    if subnet.overlaps(UPLINK):
        raise InvalidInput(f"the subnet {subnet} can't be", f"{UPLINK} leads out of networks", "Choose another.")
    return str(subnet)


def free_subnet(taken: Iterable[str]) -> str:
    """The first /24 of the pool that overlaps none of these. Raises `InvalidInput` when there is none."""
    others = [ipaddress.IPv4Network(each, strict=False) for each in taken]
    for subnet in POOL.subnets(new_prefix=24):
        if not any(subnet.overlaps(other) for other in others):
            return str(subnet)
    raise InvalidInput(f"{POOL} has no free subnet", next_step="Choose one with --subnet.")


def check_address(network: Network, address: str) -> str:
    """An address that a VM on the network may have. Raises `InvalidInput`."""
    subnet = _subnet(network) if network.subnet else ipaddress.IPv4Network("0.0.0.0/0")
    try:
        wanted = ipaddress.IPv4Address(address)
    except ValueError as error:
        raise InvalidInput(f"{shown(address)} isn't an IPv4 address", next_step=f"One of {subnet} will do.") from error
    if wanted not in subnet:
        raise InvalidInput(f"{wanted} isn't in the network '{network.name}'", f"that has {subnet}")
    if wanted.is_multicast or wanted.is_loopback:
        raise InvalidInput(f"no VM can have {wanted}", "it means something else to every computer", "Choose another.")
    if wanted in (subnet.network_address, subnet.broadcast_address) or str(wanted) == network.gateway:
        raise InvalidInput(f"no VM can have {wanted}", f"the network '{network.name}' has it itself", "Choose another.")
    return str(wanted)


def free_address(network: Network, taken: Collection[str]) -> str:
    """The first that nobody has. Raises `AlreadyExists` when the network is full."""
    for address in _subnet(network).hosts():
        if str(address) != network.gateway and str(address) not in taken:
            return str(address)
    raise AlreadyExists(
        f"the network '{network.name}' is full", f"all addresses of {network.subnet} are given", "Make a larger one."
    )


def overlapped(subnet: str, others: Iterable[str]) -> str | None:
    """The first of the others that has addresses of this one."""
    wanted = ipaddress.IPv4Network(subnet)
    return next((each for each in others if wanted.overlaps(ipaddress.IPv4Network(each, strict=False))), None)
