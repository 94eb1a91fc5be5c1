"""Whether a machine that comes from elsewhere, in a bundle or a backup, can be believed. Pure.

Its names become names of files, and its addresses words for QEMU and nft: each is held to what Atoll itself would have
written.
"""

import re

from atoll.errors import InvalidInput
from atoll.model.names import shown
from atoll.model.spec import VmSpec
from atoll.operations import resolve, resolve_disks
from atoll.qemu import devices

_MACHINE_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_NIC = re.compile(r"[a-z][a-z0-9]{0,15}", re.ASCII)
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", re.ASCII)


def check_spec(spec: VmSpec) -> None:
    """Raises `InvalidInput`."""
    _require(_MACHINE_TYPE.fullmatch(spec.machine_type), f"the machine type {shown(spec.machine_type)}")
    _require((spec.machine == "virt") is (spec.arch != "x86_64"), f"{spec.machine} isn't for {spec.arch}")
    resolve.check_cpu(spec.cpu)
    _require(resolve.check_memory(spec.memory) == spec.memory, "an odd size of memory")
    resolve.check_cmdline(spec.boot.cmdline)
    _require((spec.boot.firmware == "kernel") is (spec.boot.kernel is not None), "it has no kernel, or one too many")
    devices.check_disks(spec)
    for disk in spec.disks:
        _require(resolve_disks.may_be_called(disk.name), f"the disk's name {shown(disk.name)}")
        _require(0 < disk.size <= resolve_disks.LARGEST_DISK, f"the size of the disk '{disk.name}'")
    for nic in spec.nics:
        _require(_NIC.fullmatch(nic.name) and _MAC.fullmatch(nic.mac), f"the network card {shown(nic.name)}")
    for names in ([disk.name for disk in spec.disks], [nic.name for nic in spec.nics]):
        _require(len(names) == len(set(names)), "two devices have one name")


def _require(holds: object, why: str) -> None:
    if not holds:
        raise InvalidInput(f"its description is wrong: {why}")
