"""What the verbs take. The same Structs serve the CLI, the SDK and, later, the HTTP API."""

from typing import Literal, TypeVar

import msgspec
from msgspec import Struct, field

from atoll.errors import InvalidInput
from atoll.model.isolation import IsolationLevel
from atoll.model.network import Mode
from atoll.model.pressure import PressurePolicy
from atoll.model.spec import AcceleratorChoice, Arch, Bus, Firmware, Machine, PortSpec
from atoll.model.supervision import RestartPolicy

Request = TypeVar("Request", bound=Struct)


def check_text(request: Request) -> Request:
    """The request itself, or `InvalidInput` when some text in it can't be recorded: bytes that aren't UTF-8."""
    try:
        msgspec.json.encode(request)
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{error.object[:80]!a} can't be used", "it has bytes that aren't UTF-8", "Write it in UTF-8."
        ) from error
    return request


class DiskRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A further disk: a blank one of `size`, or an existing image's disk, or an ISO image's."""

    name: str = ""
    """`data1`, `data2` … when empty."""
    size: str | int | None = None
    image: str | None = None
    bus: Bus | None = None


class ShareRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A folder of this computer that the guest shall see."""

    host_path: str
    guest_path: str
    read_only: bool = False


class NicRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network card."""

    network: str = "user"
    """A network's name; `user` for one of its own."""
    address: str | None = None
    """One of the network's; a free one when None."""
    mac: str | None = None
    groups: tuple[str, ...] = ()
    """Security groups."""
    limit: int = 0
    """Bytes a second in each direction; 0 for all."""


class NicSetRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other rules for a card on a network; None leaves something alone."""

    network: str | None = None
    """None for the only one that it is on."""
    groups: tuple[str, ...] | None = None
    """They take the place of those before."""
    limit: int | None = None
    """Bytes a second in each direction; 0 for all."""


class NetworkRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new network. What is None is chosen."""

    name: str
    mode: Mode = "private"
    """`private` leads nowhere, `nat` out through this computer, `bridge` is the network behind a bridge of its."""
    bridge: str | None = None
    """The bridge's name, for that."""
    subnet: str | None = None
    dns_domain: str | None = None
    """`NAME.atoll` when None."""
    ipv6: bool = False
    """It has IPv6 addresses as well, of a prefix of its own that is chosen once."""


class ImpairRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a VM's cable on a network shall do wrong, each way; it takes the place of what it did wrong before."""

    network: str | None = None
    """None for the only one that it is on."""
    towards: str | None = None
    """Only what goes to this VM, and comes from it; what was said of all others stays."""
    loss: float = 0
    """Packets that are lost, of 100."""
    rate: int = 0
    """Bytes a second; 0 for all. Not towards one VM."""
    cut_from: tuple[str, ...] = ()
    """VMs on the network that it can't reach, nor they it. Not towards one VM."""
    delay: float = 0
    """Seconds."""
    jitter: float = 0
    """A delay is by up to this longer or shorter; the order stays."""
    duplicate: float = 0
    """Packets that come twice, of 100."""
    reorder: float = 0
    """Packets that are overtaken by those behind them, of 100."""


class CaptureRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a VM's frames is wanted. None stands for its only card, and for as long as it runs."""

    network: str | None = None
    nic: str | None = None
    """The card's name, such as `net0`."""
    count: int | None = None
    seconds: float | None = None


class CreateRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new VM. What is None comes from the image, else from Atoll's defaults."""

    image: str | None = None
    """A reference to an image; None for a VM without one (blank disks, ISO, firmware only)."""
    name: str | None = None
    """Made up (`brave-otter`) when None."""
    cpus: int | None = None
    max_cpus: int | None = None
    cpu_model: str | None = None
    sockets: int | None = None
    threads: int | None = None
    memory: str | int | None = None
    disk_size: str | int | None = None
    """The size of the first disk; not smaller than the image's."""
    disks: tuple[DiskRequest, ...] = ()
    ports: tuple[PortSpec, ...] = ()
    network: Literal["user", "none"] = "user"
    shares: tuple[ShareRequest, ...] = ()
    nics: tuple[NicRequest, ...] = ()
    """Its cards, when it isn't one on a network of its own."""
    restrict_network: bool = False
    mac: str | None = None
    arch: Arch | None = None
    machine: Machine | None = None
    firmware: Firmware | None = None
    accelerator: AcceleratorChoice = "auto"
    isolation: IsolationLevel = "standard"
    cpu_limit: float | None = None
    """How many processors' time it may take; 0 for no limit, as below."""
    io_limit: str | int | None = None
    """Bytes that its disks may read and write in a second, together."""
    iops_limit: int | None = None
    """Operations of its disks in a second."""
    cdrom: tuple[str, ...] = ()
    """Images (of ISO files) put into CD drives."""
    disk_bus: Bus | None = None
    nic_model: Literal["virtio", "e1000e", "e1000"] | None = None
    display: Literal["none", "vga", "virtio"] | None = None
    cmdline: str | None = None
    """Added to the kernel's command line (direct kernel boot)."""
    user: str | None = None
    password: str | None = None
    ssh_keys: tuple[str, ...] = ()
    user_data: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    remove_when_stopped: bool = False
    restart: RestartPolicy = "never"
    """What a host's agent does when it has ended by itself."""
    autostart: bool = False
    """The agent starts it when the computer has started."""
    boot_order: int = 0
    """Lower numbers are started first, and stopped last."""
    memory_min: str | int | None = None
    """What it is always left when the computer's memory is short; half of its memory when None."""
    on_memory_pressure: PressurePolicy = "suspend"
    """What the agent may do to it then."""


class SetRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New values; None leaves a setting alone."""

    cpus: int | None = None
    max_cpus: int | None = None
    cpu_model: str | None = None
    memory: str | int | None = None
    disk_size: str | int | None = None
    """Of the first disk; disks only grow."""
    display: Literal["none", "vga", "virtio"] | None = None
    accelerator: AcceleratorChoice | None = None
    isolation: IsolationLevel | None = None
    cpu_limit: float | None = None
    """How many processors' time it may take; 0 for no limit, as below."""
    io_limit: str | int | None = None
    """Bytes that its disks may read and write in a second, together."""
    iops_limit: int | None = None
    """Operations of its disks in a second."""
    cmdline: str | None = None
    agent: bool | None = None
    """The guest agent was installed in it, or taken away."""
    labels: dict[str, str | None] = field(default_factory=dict)
    """None as a value takes the label away."""
    restart: RestartPolicy | None = None
    autostart: bool | None = None
    boot_order: int | None = None
    memory_min: str | int | None = None
    on_memory_pressure: PressurePolicy | None = None


class ImportRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that becomes an image."""

    path: str
    source: str | None = None
    """What to call it, where its path isn't what people know."""
    name: str | None = None
    """The file's own stem when None."""
    format: Literal["qcow2", "raw", "vmdk", "vdi", "vpc", "vhdx", "iso", "floppy", "kernel"] | None = None
    arch: Arch | None = None
    initrd: str | None = None
    cmdline: str = ""
    firmware: Firmware | None = None
    agent: bool = False
    description: str = ""


class PullRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published image: a name from the catalogue, or a URL."""

    source: str
    name: str | None = None
    checksum: str | None = None
    """`sha256:…` or `sha512:…`."""
    arch: Arch | None = None


class BuildRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image made from packages: `tiny`, `debian:12`, `debian:13`."""

    recipe: str
    name: str | None = None
    arch: Arch | None = None
