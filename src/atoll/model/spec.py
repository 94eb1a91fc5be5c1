"""What a VM shall be. A spec is chosen by the user and persisted; an argv never is."""

from typing import Literal

from msgspec import Struct, field

from atoll.model.isolation import IsolationLevel
from atoll.model.units import MIB

Arch = Literal["x86_64", "aarch64", "riscv64"]
Machine = Literal["q35", "microvm", "virt"]
Firmware = Literal["bios", "uefi", "kernel"]
Bus = Literal["virtio", "nvme", "sata", "scsi", "floppy"]
Protocol = Literal["tcp", "udp"]
AcceleratorChoice = Literal["auto", "kvm", "hvf", "whpx", "tcg"]


class DiskSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One disk. Its head is a qcow2 overlay on `layer`; a read-only one (`blob`) is the frozen file itself."""

    name: str
    """Unique in the VM; the serial number that the guest sees, and the stem of the file."""
    size: int
    """Virtual size in bytes."""
    layer: str | None = None
    """The id of the frozen layer below the head; None for a blank disk."""
    head: str = ""
    """The id that the head has as a layer once it is frozen; empty for a read-only disk, and in a snapshot."""
    blob: str | None = None
    """The SHA-256 of a read-only file (ISO, floppy) that is attached as it is."""
    bus: Bus = "virtio"
    media: Literal["disk", "cdrom"] = "disk"


class PortSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A guest's port published on the host."""

    host_port: int
    guest_port: int
    host_address: str = "127.0.0.1"
    protocol: Protocol = "tcp"

    def __str__(self) -> str:
        return f"{self.host_address}:{self.host_port}:{self.guest_port}/{self.protocol}"


NOWHERE = ""
"""The network of a card whose cable leads nowhere: its network was removed under a machine that needs the card."""


class NicSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network card: on a network that VMs share, else on a user-mode network of its own."""

    name: str
    mac: str
    model: Literal["virtio", "e1000e", "e1000"] = "virtio"
    ports: tuple[PortSpec, ...] = ()
    restrict: bool = False
    """No way out to the host or beyond; published ports still work. Of a user-mode network only."""
    network: str | None = None
    """The id of the network that it is on; None for one of its own; empty when its cable leads nowhere."""
    address: str | None = None
    """Its IPv4 address there, given for as long as it is attached."""
    groups: tuple[str, ...] = ()
    """The security groups whose rules hold for it there, in this order. One that isn't there allows nothing."""
    limit: int = 0
    """Bytes a second that pass in each direction there; 0 for all."""


class ShareSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A folder of this computer in the guest."""

    number: int
    """Of its port; kept for as long as it is shared, since saved memory knows the port."""
    host_path: str
    """Without symbolic links; empty for a mere port, that only the guest's memory knows: until the next boot."""
    guest_path: str
    read_only: bool = False


class BootSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the guest starts: by firmware from its disks, or by a kernel given directly."""

    firmware: Firmware = "bios"
    kernel: str | None = None
    """SHA-256 of the kernel's blob, for `firmware="kernel"`."""
    initrd: str | None = None
    cmdline: str = ""
    rom: str | None = None
    """SHA-256 of a blob used in place of the machine's firmware (U-Boot, a coreboot image)."""


class GuestSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What Atoll may expect inside."""

    agent: bool = False
    """The QEMU guest agent answers once the guest is up; without it, `ready` means that it runs."""
    seed: Literal["none", "cmdline", "nocloud"] = "none"
    """How the first boot learns its host name and logins: kernel command line (host name only), or a NoCloud ISO."""


class SeedSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the user asked for at the first boot. Passwords are kept hashed only."""

    user: str | None = None
    password_hash: str | None = None
    ssh_keys: tuple[str, ...] = ()
    user_data: str | None = None
    """Cloud-init user data, used as it is instead of what Atoll would write."""

    @property
    def empty(self) -> bool:
        return self == SeedSpec()


class CpuSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: int = 1
    """Virtual CPUs at start."""
    maximum: int = 1
    """How many there can be without a restart."""
    model: str = "default"
    """A QEMU CPU model; `default` is the host's own where the accelerator has it, else the fullest emulated one."""
    sockets: int = 1
    threads: int = 1


class LimitSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a VM may take of its computer; 0 is all that there is."""

    cpus: float = 0
    """How many processors' time."""
    io_bytes: int = 0
    """What its disks read and write in a second, together."""
    io_operations: int = 0


class VmSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides how QEMU is started, but for the host's own facts."""

    arch: Arch = "x86_64"
    machine: Machine = "q35"
    machine_type: str = ""
    """The versioned machine type (`pc-q35-10.0`), pinned at creation so that the guest's hardware never changes."""
    accelerator: AcceleratorChoice = "auto"
    cpu: CpuSpec = CpuSpec()
    memory: int = 512 * MIB
    """Bytes."""
    boot: BootSpec = BootSpec()
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    shares: tuple[ShareSpec, ...] = ()
    display: Literal["none", "vga", "virtio"] = "vga"
    guest: GuestSpec = GuestSpec()
    seed: SeedSpec = SeedSpec()
    addresses: dict[str, str] = field(default_factory=dict)
    """Resolved device addresses (`{"disk-root": "pcie.0/3"}`), given once and kept."""
    clock: Literal["utc", "localtime"] = "utc"
    isolation: IsolationLevel = "standard"
    limits: LimitSpec = LimitSpec()

    @property
    def wants_seed(self) -> bool:
        """Whether a first-boot seed is attached: something was asked for, or the image has no agent to be told by.

        An image that has an agent boots faster without one (cloud-init doesn't run).
        """
        return self.guest.seed == "nocloud" and (not self.seed.empty or not self.guest.agent)
