"""Devices and block nodes as the JSON that QEMU takes, for the command line and for hot plug alike. Pure."""

from typing import Any

from atoll.errors import InvalidInput, Unsupported
from atoll.model.spec import DiskSpec, NicSpec, ShareSpec, VmSpec

Properties = dict[str, Any]

HOTPLUG_PORTS = 4
"""PCIe ports kept free for disks that are added while the VM runs (devices on the root bus can't be hot-plugged)."""
STREAMS = 4
"""Sets of in/out/err ports, one for each `exec` that runs at the same time."""
TERMINALS = 3
"""Virtual consoles (/dev/hvc0 …) for `shell`."""
SLOTS = range(1, 31)
"""Those of the root bus: 0 is the host bridge, 31 the q35's own controllers."""
MOST_PORTS = 31
"""Of the virtio-serial device; those that are left are for shared folders."""
AGENT_PORT = "org.qemu.guest_agent.0"


def disk_id(name: str) -> str:
    """The id of a disk's device."""
    return f"disk-{name}"


def node_name(disk: str, layer: str) -> str:
    """The block node of a layer in a disk's chain. It stays when a head is frozen: a head has its future layer's id.

    Node names have at most 31 bytes, so disk names have at most 20 (see `operations/resolve.py`).
    """
    return f"{disk}.{layer[:8]}"


def head_node(disk: DiskSpec) -> str:
    """The block node that a disk's device uses."""
    return node_name(disk.name, disk.blob or disk.head)


def file_node_name(node: str) -> str:
    """The block node of the file below a layer's."""
    return f"{node}-f"


def assign_addresses(spec: VmSpec) -> dict[str, str]:
    """A PCIe slot on the root bus for each device that has none yet; those given before stay.

    Raises `InvalidInput` when there are more devices than slots.
    """
    wanted = []
    if spec.display != "none":
        wanted.append("display")
    if needs_input_devices(spec):
        wanted += ["keyboard", "tablet"]
    wanted += [f"nic-{nic.name}" for nic in spec.nics]
    wanted += [disk_id(disk.name) for disk in spec.disks if disk.bus in ("virtio", "nvme")]
    if spec.wants_seed:
        wanted.append("seed")
    if any(disk.bus == "scsi" for disk in spec.disks):
        wanted.append("scsi")
    if any(disk.bus == "sata" for disk in spec.disks) and spec.machine != "q35":
        wanted.append("ahci")
    wanted += ["channels", "rng", "balloon"]
    wanted += [f"hotplug{number}" for number in range(HOTPLUG_PORTS)]
    wanted.append("panic")
    kept = {device: slot for device, slot in spec.addresses.items() if device in wanted}
    new = [device for device in wanted if device not in kept]
    free = [slot for slot in SLOTS if f"0x{slot:x}" not in kept.values()]
    if len(new) > len(free):
        raise InvalidInput(
            f"{len(wanted)} devices are too many for one machine",
            f"it has {len(SLOTS)} slots, and each virtio or nvme disk takes one",
            "Put disks on the bus scsi: they share a slot.",
        )
    return kept | {device: f"0x{slot:x}" for device, slot in zip(new, free, strict=False)}


def check_disks(spec: VmSpec) -> None:
    """Raises `InvalidInput` for more disks than a bus takes, `Unsupported` for a bus that the machine lacks."""
    for bus, most in (("sata", 6), ("floppy", 2), ("scsi", 256)):
        count = sum(disk.bus == bus for disk in spec.disks)
        if count > most:
            raise InvalidInput(f"{count} {bus} disks are too many", f"{bus} takes {most}", "Use another bus.")
    if spec.machine != "q35" and any(disk.bus == "floppy" for disk in spec.disks):
        raise Unsupported(f"the machine '{spec.machine}' has no floppy drive", next_step="Use --machine q35.")
    for disk in spec.disks:
        if disk.bus == "sata" and disk.blob is not None and disk.media != "cdrom":
            raise InvalidInput(
                f"the disk '{disk.name}' is read-only, and a sata disk can't be", next_step="Use bus=virtio or scsi."
            )


def needs_input_devices(spec: VmSpec) -> bool:
    """q35 has a PS/2 keyboard and mouse of its own."""
    return spec.display != "none" and spec.machine != "q35"


def on_root_bus(spec: VmSpec, device: Properties) -> Properties:
    """The device at its pinned slot; one that was plugged in while the VM ran stays in its hot-plug port."""
    address = spec.addresses[device["id"]]
    if address.startswith("hotplug"):
        return device | {"bus": address, "addr": "0x0"}
    return device | {"bus": "pcie.0", "addr": address}


def _modern(driver: str) -> Properties:
    """Virtio 1.0 only: the legacy interface costs I/O ports and an old code path in the guest."""
    return {"driver": driver, "disable-legacy": "on"}


def file_node(name: str, descriptor_set: int, *, read_only: bool) -> Properties:
    """The protocol layer of a disk that was handed over as a descriptor set."""
    return {
        "driver": "file",
        "node-name": name,
        "filename": f"/dev/fdset/{descriptor_set}",
        "read-only": read_only,
        "discard": "unmap",
    }


def format_node(name: str, driver: str, file: str, *, read_only: bool, backing: str | None = None) -> Properties:
    """The format layer. `backing` names the node below; None cuts off whatever the file itself may say."""
    node: Properties = {"driver": driver, "node-name": name, "file": file, "read-only": read_only}
    if driver == "qcow2":
        node["backing"] = backing
    if not read_only:
        node |= {"discard": "unmap", "detect-zeroes": "unmap"}
    return node


def disk_devices(spec: VmSpec, disk: DiskSpec, *, boot_index: int | None, bus: str | None = None) -> list[Properties]:
    """The device of a disk, after its controller if it is the first to need it. `bus` is a hot-plug port."""
    device: Properties = {"id": disk_id(disk.name), "drive": head_node(disk)}
    if boot_index is not None and disk.bus != "floppy":
        device["bootindex"] = boot_index
    match disk.bus:
        case "virtio":
            device |= _modern("virtio-blk-pci") | {"serial": disk.name}
        case "nvme":
            device |= {"driver": "nvme", "serial": disk.name}
        case "scsi":
            device |= {
                "driver": "scsi-cd" if disk.media == "cdrom" else "scsi-hd",
                "serial": disk.name,
                "bus": "scsi.0",
            }
        case "sata":
            channel = [other.name for other in spec.disks if other.bus == "sata"].index(disk.name)
            controller = "ide" if spec.machine == "q35" else "ahci"
            device |= {"driver": "ide-cd" if disk.media == "cdrom" else "ide-hd", "serial": disk.name}
            device |= {"bus": f"{controller}.{channel}"}
        case "floppy":
            unit = [other.name for other in spec.disks if other.bus == "floppy"].index(disk.name)
            device |= {"driver": "floppy", "unit": unit}
    if disk.bus in ("virtio", "nvme"):
        return [device | {"bus": bus, "addr": "0x0"} if bus else on_root_bus(spec, device)]
    return [device]


def controllers(spec: VmSpec) -> list[Properties]:
    """Controllers that the disks need and the machine lacks."""
    found: list[Properties] = []
    if any(disk.bus == "scsi" for disk in spec.disks):
        found.append(on_root_bus(spec, _modern("virtio-scsi-pci") | {"id": "scsi"}))
    if any(disk.bus == "sata" for disk in spec.disks) and spec.machine != "q35":
        found.append(on_root_bus(spec, {"driver": "ahci", "id": "ahci"}))
    floppies = [index for index, disk in enumerate(spec.disks, start=1) if disk.bus == "floppy"]
    if floppies:
        # The place of its drives in the boot order is told to the controller.
        order = {f"bootindex{drive}": index for drive, index in zip("AB", floppies, strict=False)}
        found.append({"driver": "isa-fdc", "id": "floppies"} | order)
    return found


def seed_device(spec: VmSpec) -> Properties:
    """The first-boot seed: cloud-init finds it by its label on whatever bus."""
    return on_root_bus(spec, _modern("virtio-blk-pci") | {"id": "seed", "drive": "seed-iso", "serial": "seed"})


def network_descriptor(nic: NicSpec) -> str:
    """The name of the descriptor that the NIC's frames go through."""
    return f"nic-{nic.name}"


def network_backend(nic: NicSpec) -> Properties:
    """What QEMU has of a network is a descriptor; who is behind it isn't its business."""
    descriptor = f"@fd:{network_descriptor(nic)}@"
    if nic.network is not None:
        return {"type": "tap", "id": f"net-{nic.name}", "fd": descriptor}
    # A socket that carries a frame in each message.
    return {"type": "dgram", "id": f"net-{nic.name}", "local": {"type": "fd", "str": descriptor}}


def network_device(spec: VmSpec, nic: NicSpec, *, bus: str | None = None) -> Properties:
    """No option ROM: network boot is asked for by an iPXE image, and the ROM costs time at every boot.

    `bus` is a hot-plug port.
    """
    device: Properties = {"id": f"nic-{nic.name}", "netdev": f"net-{nic.name}", "mac": nic.mac, "romfile": ""}
    driver = _modern("virtio-net-pci") if nic.model == "virtio" else {"driver": nic.model}
    return driver | device | {"bus": bus, "addr": "0x0"} if bus else on_root_bus(spec, driver | device)


def channel_names() -> list[str]:
    """The sockets of the virtio-serial device, in the order of their port numbers."""
    terminals = [f"tty{number}" for number in range(TERMINALS)]
    streams = [f"{direction}{number}" for number in range(STREAMS) for direction in ("in", "out", "err")]
    return [*terminals, "agent", *streams]


def share_name(share: ShareSpec) -> str:
    """The character device behind a folder's port."""
    return f"share{share.number}"


def share_port_id(share: ShareSpec) -> str:
    return f"port-{share_name(share)}"


def share_port(share: ShareSpec) -> Properties:
    """A port of the virtio-serial device that a folder is served through."""
    return {
        "driver": "virtserialport",
        "bus": "channels.0",
        "nr": len(channel_names()) + share.number,
        "chardev": share_name(share),
        "id": share_port_id(share),
        "name": f"org.atoll.share.{share.number}",
    }


def channel_devices(spec: VmSpec) -> list[Properties]:
    """The virtio-serial device with its consoles, the agent's port and the stream ports."""
    devices = [on_root_bus(spec, _modern("virtio-serial-pci") | {"id": "channels", "max_ports": MOST_PORTS})]
    for number, name in enumerate(channel_names()):
        port: Properties = {"bus": "channels.0", "nr": number, "chardev": name, "id": f"port-{name}"}
        if name.startswith("tty"):
            devices.append({"driver": "virtconsole"} | port)
        elif name == "agent":
            devices.append({"driver": "virtserialport", "name": AGENT_PORT} | port)
        else:
            devices.append({"driver": "virtserialport", "name": f"org.atoll.{name[:-1]}.{name[-1]}"} | port)
    return devices


def common_devices(spec: VmSpec) -> list[Properties]:
    """What every guest gets: randomness, a balloon that reports free pages, ports for hot plug, and for its kernel a
    way to say that it panicked."""
    # A guest that would end programs of its own for want of memory takes it back from its balloon. (Memory that was
    # saved without that is loaded: its guest goes on not knowing of it.)
    balloon = {"id": "balloon", "free-page-reporting": True, "deflate-on-oom": True}
    found = [
        on_root_bus(spec, _modern("virtio-rng-pci") | {"id": "rng", "rng": "entropy"}),
        on_root_bus(spec, _modern("virtio-balloon-pci") | balloon),
    ]
    if "panic" in spec.addresses:
        found.append(on_root_bus(spec, {"driver": "pvpanic-pci", "id": "panic"}))
    for number in range(HOTPLUG_PORTS):
        port = {"driver": "pcie-root-port", "id": f"hotplug{number}", "chassis": number + 1}
        # Reserving no I/O window keeps firmware and kernel from sizing one that nothing uses.
        found.append(on_root_bus(spec, port | {"io-reserve": 0}))
    return found


def display_devices(spec: VmSpec) -> list[Properties]:
    """A screen, and a keyboard and pointer where the machine has none of its own."""
    if spec.display == "none":
        return []
    driver = "virtio-gpu-pci" if spec.display == "virtio" else "VGA" if spec.arch == "x86_64" else "ramfb"
    screen: Properties = {"driver": driver, "id": "display"}
    devices = [screen if driver == "ramfb" else on_root_bus(spec, screen)]
    if needs_input_devices(spec):
        devices += [
            on_root_bus(spec, _modern("virtio-keyboard-pci") | {"id": "keyboard"}),
            on_root_bus(spec, _modern("virtio-tablet-pci") | {"id": "tablet"}),
        ]
    return devices
