"""A network that VMs share: its record. Every command reads it, so nothing slow is imported here."""

from typing import Literal

from msgspec import Struct, field

from atoll.model.groups import Group

Mode = Literal["private", "nat", "bridge"]
RESERVED_NAMES = frozenset({"user", "none"})
"""What `--network` means otherwise."""


class Network(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network as it is recorded. Whether it is up isn't here: that is observed."""

    id: str
    name: str
    mode: Mode
    subnet: str
    """`10.213.0.0/24`. Empty, as all below, in mode bridge: that is somebody else's network."""
    domain: str
    """Every VM is called NAME and NAME.DOMAIN."""
    created_at: float

    gateway: str
    """The network's own address: it answers for names, hands out addresses and, in mode nat, leads out."""
    bridge: str = ""
    """In mode bridge: the bridge of this computer that VMs are put on."""
    subnet6: str | None = None
    """`fd5a:…::/64`: its IPv6 addresses; none where guests speak IPv4 only."""


class Attached(Struct, frozen=True, kw_only=True):
    """A VM's card on a network."""

    vm_id: str
    vm: str
    nic: str
    mac: str
    address: str
    """Empty in mode bridge, unless the card was given one."""
    groups: tuple[str, ...] = ()
    """The security groups whose rules hold for it."""
    limit: int = 0
    """Bytes a second that pass in each direction; 0 for all."""
    labels: dict[str, str] = field(default_factory=dict)
    """The VM's: rules name VMs by them."""
    address6: str = ""
    """Its IPv6 address, where the network has some. It follows from the hardware address."""


class Members(Struct, frozen=True, kw_only=True):
    """Who is on a network, and what their groups say."""

    network: Network
    attached: tuple[Attached, ...] = ()
    groups: tuple[Group, ...] = ()


class Relayed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a relay does to frames of a card, each way."""

    peer: str | None = None
    """Only to and from this card; None for all that none is said of."""
    delay: float = 0
    """Seconds."""
    jitter: float = 0
    """A delay is by up to this longer or shorter. It doesn't change the order."""
    loss: float = 0
    """Of 100, as all below."""
    duplicate: float = 0
    reorder: float = 0
    """Frames that are overtaken by those behind them."""


class Impairment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How badly a card's cable works, in both directions. The card is named by its hardware address."""

    mac: str
    loss: float = 0
    """Packets that are lost, of 100."""
    rate: int = 0
    """Bytes a second that pass in each direction; 0 for all."""
    cut_from: tuple[str, ...] = ()
    """Cards that it can't reach, nor they it."""
    relayed: tuple[Relayed, ...] = ()


class NetworkInfo(Struct, frozen=True, kw_only=True):
    """A network as `net ls` and `net show` tell it."""

    network: Network
    up: bool
    """It is there on this computer. It comes up by itself when a VM on it starts."""
    attached: tuple[Attached, ...] = ()
    impairments: tuple[Impairment, ...] = ()
    """What cables do wrong."""
    troubles: tuple[str, ...] = ()
    """What VMs lack since a helper has ended, and what mends it. Only `show` looks for them."""
