"""Turns what the user asked for, an image and the engine's capabilities into a whole `VmSpec`. Pure, but for chance."""

import re
import secrets
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from atoll.errors import InvalidInput, Unsupported
from atoll.model.image import Image, ImageDisk
from atoll.model.launch import Capabilities
from atoll.model.requests import CreateRequest, DiskRequest
from atoll.model.spec import (
    Arch,
    BootSpec,
    Bus,
    CpuSpec,
    DiskSpec,
    Firmware,
    GuestSpec,
    Machine,
    NicSpec,
    SeedSpec,
    VmSpec,
)
from atoll.model.units import GIB, MIB, TIB, format_size, parse_size
from atoll.qemu import devices

DEFAULT_MEMORY = 1 * GIB
SMALLEST_MEMORY, LARGEST_MEMORY = 16 * MIB, 16 * TIB
LARGEST_DISK = 64 * TIB
LARGEST_CPUS = 288
"""What q35 takes (`max-cpus` of its machine class, without an interrupt remapping unit 255; QEMU tells the rest)."""
_DISK_NAME = re.compile(r"[a-z][a-z0-9-]{0,19}", re.ASCII)
_LONGEST_CMDLINE = 2047
"""Linux on x86 keeps 2048 bytes (COMMAND_LINE_SIZE)."""

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
    firmware = _firmware(request, image, arch)
    spec = VmSpec(
        arch=arch,
        machine=machine,
        machine_type=caps.machines[machine],
        accelerator=request.accelerator,
        cpu=_cpu(request, machine, host_cpus),
        memory=check_memory(request.memory if request.memory is not None else (image.memory if image else None)),
        boot=_boot(request, image, firmware),
        disks=_disks(request, image, cdroms),
        nics=_nics(request),
        display=request.display or _display(image, arch),
        guest=image.guest if image else GuestSpec(),
        seed=seed,
    )
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


def _firmware(request: CreateRequest, image: Image | None, arch: Arch) -> Firmware:
    firmware = request.firmware or (image.firmware if image else ("bios" if arch == "x86_64" else "uefi"))
    if image is not None and firmware not in image.firmwares:
        raise InvalidInput(
            f"the image {image.name} can't boot by {firmware}",
            f"it boots by {' or '.join(image.firmwares)}",
            "Choose one with --firmware.",
        )
    if firmware == "bios" and arch == "aarch64":
        raise InvalidInput("arm64 machines have no BIOS", next_step="Use --firmware uefi.")
    if firmware == "uefi" and request.machine == "microvm":
        raise InvalidInput("the machine 'microvm' has no UEFI", next_step="Use --machine q35.")
    return firmware


def _cpu(request: CreateRequest, machine: Machine, host_cpus: int) -> CpuSpec:
    count = request.cpus if request.cpus is not None else 1
    sockets, threads = request.sockets or 1, request.threads or 1
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
            f"{cpu.model!r} isn't a CPU model", next_step="Leave it away, or name one of QEMU's, like 'max'."
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
    if len(cmdline.encode()) > _LONGEST_CMDLINE - 100 or "\0" in cmdline:
        raise InvalidInput(
            "the kernel's command line is too long", f"it has {len(cmdline.encode())} bytes of at most 1900"
        )
    return cmdline


def _display(image: Image | None, arch: Arch) -> Literal["none", "vga", "virtio"]:
    if image is not None and not image.display:
        return "none"
    return "vga" if arch == "x86_64" else "virtio"


def _disks(request: CreateRequest, image: Image | None, cdroms: Sequence[Image]) -> tuple[DiskSpec, ...]:
    disks = [_from_image(disk, request.disk_bus) for disk in (image.disks if image else ())]
    if request.disk_size is not None:
        disks = _grown(disks, check_disk_size(request.disk_size), request.disk_bus or "virtio")
    for further in request.disks:
        if further.image is None:
            disks.append(further_disk(further, disks))
    for number, cdrom in enumerate(cdroms):
        media = next((disk for disk in cdrom.disks if disk.blob), None)
        if media is None:
            raise InvalidInput(
                f"the image {cdrom.name} isn't a CD", next_step="Import an ISO file: `atoll image import FILE.iso`."
            )
        bus: Bus = "sata" if guest_arch(request, image) == "x86_64" else "scsi"
        disks.append(DiskSpec(name=f"cd{number}", size=media.size, blob=media.blob, bus=bus, media="cdrom"))
    names = [disk.name for disk in disks]
    if len(set(names)) < len(names):
        raise InvalidInput(
            f"two disks have the same name: {', '.join(sorted(names))}", next_step="Give each its own name=…."
        )
    return tuple(disks)


def _from_image(disk: ImageDisk, bus: Bus | None) -> DiskSpec:
    chosen = bus if bus is not None and disk.layer is not None else disk.bus
    return DiskSpec(name=disk.name, size=disk.size, layer=disk.layer, blob=disk.blob, bus=chosen, media=disk.media)


def _grown(disks: list[DiskSpec], size: int, bus: Bus) -> list[DiskSpec]:
    """The first writable disk gets `size`; without one there is a new blank disk, before any CD."""
    for index, disk in enumerate(disks):
        if disk.blob is None:
            if size < disk.size:
                raise InvalidInput(
                    f"the disk can't have {format_size(size)}",
                    f"the image's has {format_size(disk.size)}, and disks only grow",
                )
            return [*disks[:index], replace(disk, size=size), *disks[index + 1 :]]
    return [DiskSpec(name="root", size=size, bus=bus), *disks]


def further_disk(request: DiskRequest, others: Sequence[DiskSpec], image: Image | None = None) -> DiskSpec:
    """A disk beside the ones that are there. Raises `InvalidInput`."""
    taken = {disk.name for disk in others}
    name = request.name or next(f"data{number}" for number in range(1, 1000) if f"data{number}" not in taken)
    if not _DISK_NAME.fullmatch(name) or re.search(r"-\d+$", name) or name.endswith("-file"):
        raise InvalidInput(
            f"{name!r} can't be the name of a disk",
            "it has up to 20 lower-case letters, digits and '-', and doesn't end like '-1'",
        )
    if name in taken:
        raise InvalidInput(f"there is a disk '{name}' already", next_step="Choose another name.")
    if image is not None:
        source = next(iter(image.disks), None)
        if source is None:
            raise InvalidInput(f"the image {image.name} has no disk")
        size = source.size if request.size is None else max(source.size, check_disk_size(request.size))
        return DiskSpec(
            name=name,
            size=size,
            layer=source.layer,
            blob=source.blob,
            bus=request.bus or source.bus,
            media=source.media,
        )
    if request.size is None:
        raise InvalidInput(f"the disk '{name}' has no size", next_step="Give one, like size=10GiB.")
    return DiskSpec(name=name, size=check_disk_size(request.size), bus=request.bus or "virtio")


def with_disk_images(spec: VmSpec, request: CreateRequest, images: dict[str, Image]) -> VmSpec:
    """The spec with further disks that come from images, and addresses for all."""
    disks = list(spec.disks)
    for further in request.disks:
        if further.image is not None:
            disks.append(further_disk(further, disks, images[further.image]))
    spec = replace(spec, disks=tuple(disks))
    return replace(spec, addresses=devices.assign_addresses(spec))


def check_disk_size(size: str | int) -> int:
    """Bytes, a multiple of 512. Raises `InvalidInput`."""
    number = parse_size(size)
    if not MIB <= number <= LARGEST_DISK:
        raise InvalidInput(f"a disk of {format_size(number)} can't be", f"it has 1MiB to {format_size(LARGEST_DISK)}")
    return -(-number // 512) * 512


def _nics(request: CreateRequest) -> tuple[NicSpec, ...]:
    if request.network == "none":
        if request.ports:
            raise InvalidInput("ports can't be published without a network", next_step="Leave --network none away.")
        return ()
    if request.mac is not None and not re.fullmatch(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", request.mac.lower()):
        raise InvalidInput(
            f"{request.mac!r} isn't a hardware address of one card", next_step="Write it like 52:54:00:12:34:56."
        )
    mac = (request.mac or new_mac()).lower()
    return (
        NicSpec(
            name="net0",
            mac=mac,
            model=request.nic_model or "virtio",
            ports=request.ports,
            restrict=request.restrict_network,
        ),
    )


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key in labels:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,62}", key):
            raise InvalidInput(f"{key!r} can't be a label", next_step="Use letters, digits, '.', '_', '-' and '/'.")
    return labels


def as_request(image: str | CreateRequest, options: dict[str, object]) -> CreateRequest:
    """`create("tiny", name="v1")` and `create(CreateRequest(…))` are the same. Raises `InvalidInput`."""
    if isinstance(image, CreateRequest):
        return msgspec.structs.replace(image, **options) if options else image
    try:
        return msgspec.convert({"image": image, **options}, CreateRequest, strict=True, from_attributes=True)
    except msgspec.ValidationError as error:
        known = ", ".join(CreateRequest.__struct_fields__)
        raise InvalidInput("that can't be created", str(error), f"The options are {known}.") from error
