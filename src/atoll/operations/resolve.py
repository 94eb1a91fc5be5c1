"""Turns what the user asked for, an image and the engine's capabilities into a whole `VmSpec`. Pure, but for chance."""

import re
import secrets
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from atoll.errors import InvalidInput, Unsupported
from atoll.model import pressure
from atoll.model.image import Image
from atoll.model.launch import Capabilities
from atoll.model.names import shown
from atoll.model.requests import CreateRequest, check_text
from atoll.model.spec import (
    Arch,
    BootSpec,
    CpuSpec,
    Firmware,
    GuestSpec,
    LimitSpec,
    Machine,
    NicSpec,
    PortSpec,
    SeedSpec,
    VmSpec,
)
from atoll.model.subnets import check_mac
from atoll.model.units import GIB, MIB, TIB, format_size, parse_size
from atoll.operations import limits
from atoll.operations.resolve_disks import all_disks, further_disk, with_heads
from atoll.qemu import devices

DEFAULT_MEMORY = 1 * GIB
SMALLEST_MEMORY, LARGEST_MEMORY = 16 * MIB, 16 * TIB
LARGEST_CPUS = 288
"""What q35 takes (`max-cpus` of its machine class, without an interrupt remapping unit 255; QEMU tells the rest)."""
_LONGEST_CMDLINE = 1900
"""Linux on x86 keeps 2047 bytes (COMMAND_LINE_SIZE); the host name comes to it."""

# fmt: off
_ADJECTIVES = (
    "amber", "brave", "calm", "clear", "deep", "eager", "fair", "fresh", "gentle", "keen", "kind", "lucky",
    "neat", "quick", "quiet", "ready", "sandy", "shiny", "snug", "steady", "sunny", "swift", "tidal", "wise",
)
_NOUNS = (
    "anchor", "bay", "beacon", "buoy", "clam", "coral", "crab", "current", "dune", "gull", "heron", "island",
    "kelp", "marlin", "otter", "palm", "pearl", "plover", "reef", "seal", "shell", "squid", "tern", "turtle",
)
# fmt: on


def made_up_name(taken: set[str]) -> str:
    """A name like `brave-otter` that isn't taken."""
    for _ in range(100):
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}"
        if name not in taken:
            return name
    return f"{name}-{secrets.token_hex(3)}"


def new_mac() -> str:
    """A random address in the range that QEMU's guests use (52:54:00)."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def resolve(
    request: CreateRequest,
    *,
    image: Image | None,
    cdroms: Sequence[Image],
    caps: Capabilities,
    host_cpus: int,
    seed: SeedSpec,
) -> VmSpec:
    """The spec of a new VM. Raises `InvalidInput` or `Unsupported` for what can't be."""
    arch = guest_arch(request, image)
    machine = request.machine or (image.machine if image else None) or ("q35" if arch == "x86_64" else "virt")
    _check_machine(machine, arch, caps)
    firmware = _firmware(request, image, arch, machine)
    spec = VmSpec(
        arch=arch,
        machine=machine,
        machine_type=caps.machines[machine],
        accelerator=request.accelerator,
        isolation=request.isolation,
        limits=limits.changed(LimitSpec(), request),
        cpu=_cpu(request, machine, host_cpus),
        memory=check_memory(request.memory if request.memory is not None else (image.memory if image else None)),
        boot=_boot(request, image, firmware),
        disks=with_heads(all_disks(request, image, cdroms, arch)),
        nics=_nics(request),
        display=request.display or _display(image, arch),
        guest=image.guest if image else GuestSpec(),
        seed=seed,
    )
    return _checked(spec)


def _checked(spec: VmSpec) -> VmSpec:
    """With an address for each device. Raises `InvalidInput` or `Unsupported`."""
    devices.check_disks(spec)
    return replace(spec, addresses=devices.assign_addresses(spec))


def guest_arch(request: CreateRequest, image: Image | None) -> Arch:
    """The image's architecture, else the one asked for, else x86-64."""
    if image is None:
        return request.arch or "x86_64"
    if request.arch not in (None, image.arch):
        raise InvalidInput(
            f"the image {image.name} is for {image.arch}, not {request.arch}", next_step="Leave --arch away."
        )
    return image.arch


def _check_machine(machine: Machine, arch: Arch, caps: Capabilities) -> None:
    if (machine == "virt") is (arch == "x86_64"):
        fitting = "q35 or microvm" if arch == "x86_64" else "virt"
        raise InvalidInput(f"the machine '{machine}' isn't for {arch}", next_step=f"Use --machine {fitting}.")
    if not caps.has(machine=machine):
        raise Unsupported(
            f"this QEMU ({caps.version_text}) has no machine '{machine}'", next_step="Run `atoll doctor`."
        )


def _firmware(request: CreateRequest, image: Image | None, arch: Arch, machine: Machine) -> Firmware:
    firmware = request.firmware or (image.firmware if image else ("bios" if arch == "x86_64" else "uefi"))
    if image is not None and firmware not in image.firmwares:
        raise InvalidInput(
            f"the image {image.name} can't boot by {firmware}",
            f"it boots by {' or '.join(image.firmwares)}",
            "Choose one with --firmware.",
        )
    if firmware == "bios" and arch == "aarch64":
        raise InvalidInput("arm64 machines have no BIOS", next_step="Use --firmware uefi.")
    if firmware == "uefi" and machine == "microvm":
        raise InvalidInput("the machine 'microvm' has no UEFI", next_step="Use --machine q35.")
    return firmware


def _cpu(request: CreateRequest, machine: Machine, host_cpus: int) -> CpuSpec:
    count = request.cpus if request.cpus is not None else 1
    sockets = request.sockets if request.sockets is not None else 1
    threads = request.threads if request.threads is not None else 1
    # Only q35 can plug CPUs in while it runs.
    room = max(count, min(host_cpus, LARGEST_CPUS)) if machine == "q35" and sockets * threads == 1 else count
    maximum = request.max_cpus if request.max_cpus is not None else room
    cpu = CpuSpec(count=count, maximum=maximum, model=request.cpu_model or "default", sockets=sockets, threads=threads)
    check_cpu(cpu)
    return cpu


def check_cpu(cpu: CpuSpec) -> None:
    """Raises `InvalidInput` unless the counts fit together."""
    if not 1 <= cpu.count <= cpu.maximum <= LARGEST_CPUS:
        raise InvalidInput(
            f"{cpu.count} CPUs of at most {cpu.maximum} can't be",
            f"a VM has 1 to {LARGEST_CPUS}",
            "Choose others with --cpus and --max-cpus.",
        )
    if min(cpu.sockets, cpu.threads) < 1 or cpu.maximum % (cpu.sockets * cpu.threads):
        raise InvalidInput(
            f"{cpu.maximum} CPUs don't divide into {cpu.sockets} sockets of {cpu.threads} threads a core"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*", cpu.model):
        raise InvalidInput(
            f"{shown(cpu.model)} isn't a CPU model", next_step="Leave it away, or name one of QEMU's, like 'max'."
        )


def check_memory(memory: str | int | None) -> int:
    """Bytes, rounded up to whole MiB. Raises `InvalidInput`."""
    size = DEFAULT_MEMORY if memory is None else parse_size(memory)
    if not SMALLEST_MEMORY <= size <= LARGEST_MEMORY:
        limits = f"{format_size(SMALLEST_MEMORY)} to {format_size(LARGEST_MEMORY)}"
        raise InvalidInput(
            f"{format_size(size)} of memory can't be", f"a VM has {limits}", "Choose another with --memory."
        )
    return -(-size // MIB) * MIB


def check_floor(memory: int, floor: str | int | None) -> int | None:
    """What a VM of that memory is always left, in bytes. Raises `InvalidInput`."""
    size = None if floor is None else parse_size(floor)
    pressure.check_floor(memory, size)
    return size


def _boot(request: CreateRequest, image: Image | None, firmware: Firmware) -> BootSpec:
    if firmware != "kernel":
        if request.cmdline:
            raise InvalidInput("--cmdline needs a kernel that is booted directly", f"this VM boots by {firmware}")
        return BootSpec(firmware=firmware)
    if image is None or image.kernel is None:
        raise InvalidInput(
            "there is no kernel to boot directly", next_step="Use an image with a kernel, or --firmware bios."
        )
    cmdline = check_cmdline(" ".join(word for word in (image.cmdline, request.cmdline) if word))
    return BootSpec(firmware="kernel", kernel=image.kernel, initrd=image.initrd, cmdline=cmdline)


def check_cmdline(cmdline: str) -> str:
    size = len(cmdline.encode(errors="surrogateescape"))
    if size > _LONGEST_CMDLINE:
        raise InvalidInput(
            "the kernel's command line is too long", f"it has {size} bytes of at most {_LONGEST_CMDLINE}"
        )
    if "\0" in cmdline:
        raise InvalidInput("the kernel's command line can't have a zero byte in it")
    return cmdline


def _display(image: Image | None, arch: Arch) -> Literal["none", "vga", "virtio"]:
    if image is not None and not image.display:
        return "none"
    return "vga" if arch == "x86_64" else "virtio"


def with_disk_images(spec: VmSpec, request: CreateRequest, images: dict[str, Image]) -> VmSpec:
    """The spec with further disks that come from images, and addresses for all."""
    disks = list(spec.disks)
    for further in request.disks:
        if further.image is not None:
            disks.append(further_disk(further, disks, images[further.image]))
    return _checked(replace(spec, disks=with_heads(disks)))


def _nics(request: CreateRequest) -> tuple[NicSpec, ...]:
    if request.network == "none":
        if request.ports:
            raise InvalidInput("ports can't be published without a network", next_step="Leave --network none away.")
        return ()
    for port in request.ports:
        check_port(port)
    mac = new_mac() if request.mac is None else check_mac(request.mac)
    return (
        NicSpec(
            name="net0",
            mac=mac,
            model=request.nic_model or "virtio",
            ports=request.ports,
            restrict=request.restrict_network,
        ),
    )


def check_port(port: PortSpec) -> None:
    """Raises `InvalidInput` for numbers or an address that can't be."""
    import ipaddress

    for number in (port.host_port, port.guest_port):
        if not 1 <= number <= 65535:
            raise InvalidInput(f"{number} isn't a port", "ports go from 1 to 65535")
    try:
        ipaddress.IPv4Address(port.host_address)
    except ValueError as error:
        raise InvalidInput(
            f"{shown(port.host_address)} isn't an IPv4 address", next_step="Write it like 127.0.0.1:8080:80."
        ) from error


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key in labels:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,62}", key):
            raise InvalidInput(
                f"{shown(key)} can't be a label", next_step="Use letters, digits, '.', '_', '-' and '/'."
            )
    return labels


def as_request(image: str | CreateRequest, options: dict[str, object]) -> CreateRequest:
    """`create("tiny", name="v1")` and `create(CreateRequest(…))` are the same. Raises `InvalidInput`."""
    given = msgspec.structs.asdict(image) if isinstance(image, CreateRequest) else {"image": image}
    try:
        request = msgspec.convert({**given, **options}, CreateRequest, strict=True, from_attributes=True)
        return check_text(request)
    except msgspec.ValidationError as error:
        known = ", ".join(CreateRequest.__struct_fields__)
        raise InvalidInput("that can't be created", str(error), f"The options are {known}.") from error
