"""Turns a VM's spec and the probed capabilities into a `LaunchPlan`. Pure: golden files check it.

Everything that QEMU opens is handed over by descriptor: disks and logs as descriptor sets (`-add-fd`), sockets bound
and listening, kernels and ROMs as `/proc/self/fd/N` since QEMU opens those without its own `/dev/fdset` reader.
"""

import json
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from atoll.errors import InvalidInput, Unsupported
from atoll.layout import Layout, VmPaths
from atoll.model.image import Layer
from atoll.model.launch import (
    Access,
    Capabilities,
    Feed,
    Firmware,
    LaunchPlan,
    Listener,
    Network,
    OpenFile,
    UserNetwork,
)
from atoll.model.spec import DiskSpec, NicSpec, VmSpec
from atoll.model.units import MIB
from atoll.model.vm import Vm
from atoll.qemu import devices
from atoll.qemu.cpu import TCG_CACHE_MIB, accelerator_argument, cpu_model, topology

OWN_MEMORY, MEMORY_OF_A_DISK = (TCG_CACHE_MIB + 256) * MIB, 64 * MIB
"""Bytes that QEMU may take beside the guest's RAM: translated code, stacks and buffers; and the tables of each disk."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""QEMU's own filter of system calls: what it forbids itself once it has started (`spawn`: no other program)."""

MONITORS = ("control", "observe")
"""`control` is for who holds the VM's lock, `observe` for short questions; QEMU serves one client on each."""


class PrivateRam(Struct, frozen=True, kw_only=True):
    """A part of a file that the guest's RAM begins as. The mapping is private, so the file is never written."""

    path: str
    offset: int


class PlanInputs(Struct, frozen=True, kw_only=True):
    """All that a plan depends on."""

    vm: Vm
    spec: VmSpec
    caps: Capabilities
    accelerator: str
    layout: Layout
    layers: dict[str, Layer]
    """The layers below this VM's heads, by id, with their parents."""
    firmware: Firmware | None = None
    seed: bool = False
    """Attach the first-boot seed."""
    incoming: bool = False
    """Wait for a migration stream, and don't run the guest before it is told to."""
    ram: PrivateRam | None = None


def plan(inputs: PlanInputs) -> LaunchPlan:
    """How to start the VM. Raises `Unsupported` when this QEMU lacks something the spec needs."""
    _check(inputs)
    return _Builder(inputs).build()


def _check(inputs: PlanInputs) -> None:
    spec, caps = inputs.spec, inputs.caps
    if not caps.has(machine=spec.machine_type):
        raise Unsupported(
            f"{inputs.vm.name}: this QEMU ({caps.version_text}) has no machine '{spec.machine_type}'",
            "the VM was made with another version",
            "Install the QEMU that it was made with, or newer.",
        )
    if spec.boot.firmware == "uefi" and inputs.firmware is None:
        raise Unsupported(
            f"{inputs.vm.name}: it boots by UEFI, and no firmware was found", next_step="Run `atoll doctor`."
        )
    if spec.boot.firmware == "kernel" and spec.boot.kernel is None:
        raise InvalidInput(f"{inputs.vm.name}: it boots a kernel directly, and has none")
    devices.check_disks(spec)


class _Builder:
    """Collects the argv and what goes with it, in one order that golden files can hold."""

    def __init__(self, inputs: PlanInputs) -> None:
        self.inputs = inputs
        self.spec = inputs.spec
        self.paths: VmPaths = inputs.layout.vm(inputs.vm.id)
        self.argv: list[str] = []
        self.files: list[OpenFile] = []
        self.listeners: list[Listener] = []

    def build(self) -> LaunchPlan:
        self._machine()
        self._boot()
        self._channels()
        # The ports for hot plug are among these: they come before the disks that are in them.
        for device in devices.common_devices(self.spec) + devices.display_devices(self.spec):
            self._json("-device", device)
        self._disks()
        self._network()
        if self.inputs.caps.has(type="vmgenid") and self.spec.machine == "q35":
            self._json("-device", {"driver": "vmgenid", "id": "generation", "guid": "auto"})
        self._add("-display", "none")
        if self.spec.display != "none":
            # It listens nowhere: connections are handed over by QMP.
            self._add("-vnc", "none")
        if self.inputs.incoming:
            self._add("-incoming", "defer", "-S")
        return LaunchPlan(
            binary=self.inputs.caps.binary,
            argv=tuple(self.argv),
            files=tuple(self.files),
            listeners=tuple(self.listeners),
            feeds=(Feed(name="hello", content=b'{"execute":"qmp_capabilities"}\n'),),
            networks=tuple(self._network_of(nic) for nic in self.spec.nics if nic.network is None),
            working_folder=str(self.paths.run),
            memory=self.spec.memory + OWN_MEMORY + len(self.spec.disks) * MEMORY_OF_A_DISK,
        )

    def _add(self, *words: str) -> None:
        self.argv += words

    def _json(self, flag: str, value: dict[str, Any]) -> None:
        self._add(flag, json.dumps(value, separators=(",", ":")))

    def _descriptor_set(self, name: str, path: object, access: Access) -> int:
        """Hand a file over as a descriptor set; returns the set's number."""
        self.files.append(OpenFile(name=name, path=str(path), access=access))
        number = len(self.files)
        self._add("-add-fd", f"fd=@fd:{name}@,set={number},opaque={name}")
        return number

    def _plain_descriptor(self, name: str, path: object) -> str:
        """Hand a file over for code in QEMU that opens by path."""
        self.files.append(OpenFile(name=name, path=str(path), access="read", by_path=True))
        return f"/proc/self/fd/@fd:{name}@"

    def _machine(self) -> None:
        spec, vm = self.spec, self.inputs.vm
        self._add("-name", f"guest={vm.name},debug-threads=on", "-uuid", vm.uuid)
        self._add("-nodefaults", "-no-user-config", "-msg", "timestamp=on")
        if spec.isolation != "none" and self.inputs.caps.has(option="sandbox"):
            self._add("-sandbox", SANDBOX)
        options = [f"type={spec.machine_type}", "usb=off", "dump-guest-core=off", "memory-backend=ram"]
        if spec.isolation == "strict":
            # Where the kernel merges equal pages, one guest learns by timing what another has in its memory.
            options.append("mem-merge=off")
        match spec.machine:
            case "q35":
                # Without these controllers a direct boot is a third of a second faster under emulation.
                sata = any(disk.bus == "sata" for disk in spec.disks)
                # With an HPET the idle guest's timer, whose interrupts nobody wants, wakes QEMU 250 times a second.
                options += ["hpet=off", "vmport=off", "smbus=off", f"sata={'on' if sata else 'off'}"]
            case "microvm":
                options += ["pcie=on", "rtc=on", "isa-serial=on", "acpi=on"]
                options.remove("usb=off")
            case "virt":
                options += ["gic-version=max"] if spec.arch == "aarch64" else []
        if spec.boot.firmware == "uefi":
            options += ["pflash0=firmware", "pflash1=variables"]
        accelerator = accelerator_argument(self.inputs.accelerator)
        if self.inputs.accelerator == "kvm":
            # Handed over like a file: its folder isn't there for a confined QEMU.
            accelerator += f",device=/dev/fdset/{self._descriptor_set('kvm', '/dev/kvm', 'read-write')}"
        self._add("-machine", ",".join(options), "-accel", accelerator)
        self._add("-cpu", cpu_model(spec, accelerator=self.inputs.accelerator, caps=self.inputs.caps))
        self._add("-smp", topology(spec.cpu), "-m", f"{spec.memory // MIB}M")
        self._json("-object", self._ram())
        self._json("-object", {"qom-type": "rng-random", "id": "entropy", "filename": "/dev/urandom"})
        # A guest that powers off ends QEMU; one that panics stops, so that it can be looked at.
        self._add("-rtc", f"base={spec.clock}", "-action", "panic=pause", "-boot", "menu=off,strict=on")

    def _ram(self) -> dict[str, Any]:
        ram = {"id": "ram", "size": self.spec.memory}
        if self.inputs.ram is None:
            return {"qom-type": "memory-backend-ram"} | ram
        # With `rom` off a read-only file is mapped writable, each page copied when it is written.
        file = self._plain_descriptor("ram", self.inputs.ram.path)
        private = {"share": False, "readonly": True, "rom": "off"}
        return (
            {"qom-type": "memory-backend-file"} | ram | {"mem-path": file, "offset": self.inputs.ram.offset} | private
        )

    def _boot(self) -> None:
        boot, blob = self.spec.boot, self.inputs.layout.blob
        if boot.firmware == "uefi" and self.inputs.firmware is not None:
            firmware = self.inputs.firmware
            for name, path, driver, read_only in (
                ("firmware", firmware.code, firmware.code_format, True),
                ("variables", self.paths.nvram, firmware.variables_format, False),
            ):
                number = self._descriptor_set(name, path, "read" if read_only else "read-write")
                self._json("-blockdev", devices.file_node(f"{name}-file", number, read_only=read_only))
                self._json("-blockdev", devices.format_node(name, driver, f"{name}-file", read_only=read_only))
        if boot.rom is not None:
            self._add("-bios", self._plain_descriptor("rom", blob(boot.rom)))
        if boot.firmware == "kernel" and boot.kernel is not None:
            self._add("-kernel", self._plain_descriptor("kernel", blob(boot.kernel)))
            if boot.initrd is not None:
                self._add("-initrd", self._plain_descriptor("initrd", blob(boot.initrd)))
            self._add("-append", self._command_line())

    def _command_line(self) -> str:
        words = [self.spec.boot.cmdline]
        if self.spec.guest.seed != "none":
            words.append(f"systemd.hostname={self.inputs.vm.name}")
        return " ".join(word for word in words if word)

    def _listen(self, name: str, options: str = "") -> None:
        """A character device on a socket that is bound and listening already."""
        self.listeners.append(Listener(name=name, path=str(self.paths.socket(name))))
        self._add("-chardev", f"socket,id={name},fd=@fd:{name}@,server=on,wait=off{options}")

    def _channels(self) -> None:
        for name in MONITORS:
            self._listen(name)
            self._add("-mon", f"chardev={name},mode=control")
        # A monitor that only writes: QEMU keeps its own record of events, whether or not anyone of ours is there.
        events = self._descriptor_set("events", self.paths.event_log, "append")
        self._add("-add-fd", "fd=@fd:hello@,set=100,opaque=hello")
        self._add("-chardev", f"file,id=events,path=/dev/fdset/{events},append=on,input-path=/dev/fdset/100")
        self._add("-mon", "chardev=events,mode=control")
        serial = self._descriptor_set("serial-log", self.paths.serial_log, "append")
        self._listen("serial", f",logfile=/dev/fdset/{serial},logappend=on")
        self._add("-serial", "chardev:serial")
        for name in devices.channel_names():
            self._listen(name)
        for device in devices.channel_devices(self.spec):
            self._json("-device", device)
        for share in self.spec.shares:
            # Nothing is behind it until the guest runs: what memory knows of the last one's words is worth nothing.
            self._add("-chardev", f"null,id={devices.share_name(share)}")
            self._json("-device", devices.share_port(share))

    def _disks(self) -> None:
        for controller in devices.controllers(self.spec):
            self._json("-device", controller)
        for index, disk in enumerate(self.spec.disks, start=1):
            for node in self._nodes(disk):
                self._json("-blockdev", node)
            for device in devices.disk_devices(self.spec, disk, boot_index=index):
                self._json("-device", device)
        if self.inputs.seed:
            number = self._descriptor_set("seed", self.paths.seed, "read")
            self._json("-blockdev", devices.file_node("seed-file", number, read_only=True))
            self._json("-blockdev", devices.format_node("seed-iso", "raw", "seed-file", read_only=True))
            self._json("-device", devices.seed_device(self.spec))

    def _nodes(self, disk: DiskSpec) -> list[dict[str, Any]]:
        return disk_nodes(
            disk,
            layout=self.inputs.layout,
            vm_id=self.inputs.vm.id,
            layers=self.inputs.layers,
            hand_over=self._descriptor_set,
        )

    def _network(self) -> None:
        for nic in self.spec.nics:
            self._json("-netdev", devices.network_backend(nic))
            self._json("-device", devices.network_device(self.spec, nic))

    def _network_of(self, nic: NicSpec) -> Network:
        return UserNetwork(
            name=devices.network_descriptor(nic),
            link=str(self.paths.network_link(nic.name)),
            control=str(self.paths.network_control(nic.name)),
            ports=nic.ports,
            restrict=nic.restrict,
        )


def layer_chain(layer_id: str | None, layers: dict[str, Layer]) -> list[str]:
    """The ids from the oldest layer to `layer_id`."""
    chain: list[str] = []
    while layer_id is not None:
        chain.insert(0, layer_id)
        layer_id = layers[layer_id].parent
    return chain


HandOver = Callable[[str, object, Access], int]
"""Gives a file a descriptor set, and returns the set's number."""


def disk_nodes(
    disk: DiskSpec, *, layout: Layout, vm_id: str, layers: dict[str, Layer], hand_over: HandOver
) -> list[dict[str, Any]]:
    """The block nodes of a disk, lowest first; the last is its head."""
    if disk.blob is not None:
        return layer_nodes(devices.head_node(disk), layout.blob(disk.blob), "raw", hand_over, read_only=True)
    nodes: list[dict[str, Any]] = []
    below: str | None = None
    for layer_id in layer_chain(disk.layer, layers):
        name = devices.node_name(disk.name, layer_id)
        nodes += layer_nodes(name, layout.layer(layer_id), "qcow2", hand_over, read_only=True, backing=below)
        below = name
    return nodes + head_nodes(disk, layout.vm(vm_id).head(disk), hand_over, backing=below)


def head_nodes(disk: DiskSpec, path: object, hand_over: HandOver, *, backing: str | None) -> list[dict[str, Any]]:
    """The nodes of a writable head alone; `backing` is None also where QEMU puts it on top of a node itself."""
    return layer_nodes(devices.head_node(disk), path, "qcow2", hand_over, read_only=False, backing=backing)


def layer_nodes(
    name: str, path: object, driver: str, hand_over: HandOver, *, read_only: bool, backing: str | None = None
) -> list[dict[str, Any]]:
    file = devices.file_node_name(name)
    number = hand_over(name, path, "read" if read_only else "read-write")
    return [
        devices.file_node(file, number, read_only=read_only),
        devices.format_node(name, driver, file, read_only=read_only, backing=backing),
    ]
