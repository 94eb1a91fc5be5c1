"""How a backup becomes a VM here: which layers are here already, and what of the machine is another's by now."""

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from atoll.errors import AtollError
from atoll.model.backup import Backup, BackupDisk, StoredLayer
from atoll.model.image import Layer
from atoll.model.names import new_id
from atoll.model.spec import NicSpec, PortSpec
from atoll.operations import backup_files, networks, resolve
from atoll.operations.backup_files import Total, Vanished, expanded, has_data
from atoll.operations.services import Report, Services
from atoll.qemu.plan import layer_chain

LONGEST_CHAIN = 8


class Arrival(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk's layers here: those on `base` are new."""

    disk: str
    size: int
    base: str | None = None
    """A layer that is here, with all below it."""
    new: dict[str, str] = field(default_factory=dict)
    """The ids here of the folder's layers above that, lowest first: another one where the id is taken."""
    flat: str | None = None
    """The id of a single layer with the content of the whole chain, which is too long."""

    @property
    def top(self) -> str | None:
        return self.flat or next(reversed(self.new.values()), self.base)


async def arrivals(backup: Backup, services: Services, report: Report) -> list[Arrival]:
    """Raises `StorageFailed` when a layer that is here can't be read."""
    known = {layer.id: layer for layer in services.records.layers()}
    stored = {layer.id: layer for layer in backup.layers}
    taken = _taken(services, known)
    ids: dict[str, str] = {}
    found = []
    for disk in backup.disks:
        here = await _here(disk, stored, known, services, report)
        base = disk.chain[here - 1] if here else None
        above = disk.chain[here:]
        length = len(above) + (len(layer_chain(base, known)) if base else 0)
        if above and length > LONGEST_CHAIN:
            whole = {each: each for each in disk.chain}
            found.append(Arrival(disk=disk.name, size=disk.size, new=whole, flat=new_id()))
            continue
        for layer in above:
            # Disks that were made of one image have layers in common.
            ids.setdefault(layer, new_id() if layer in taken else layer)
        found.append(Arrival(disk=disk.name, size=disk.size, base=base, new={each: ids[each] for each in above}))
    return found


def _taken(services: Services, known: Mapping[str, Layer]) -> set[str]:
    """Ids of layers, and of heads, which become layers."""
    specs = [spec for vm in services.records.vms() for spec in (vm.spec, vm.pending) if spec]
    return {*known, *(disk.head for spec in specs for disk in spec.disks)}


async def _here(
    disk: BackupDisk, stored: Mapping[str, StoredLayer], known: Mapping[str, Layer], services: Services, report: Report
) -> int:
    """How many of the chain's layers, from the lowest, are here with all that is below them."""
    for number in range(len(disk.chain), 0, -1):
        top = disk.chain[number - 1]
        if top in known and await _is_same(disk.chain[:number], top, stored, known, services, report):
            return number
    return 0


async def _is_same(
    wanted: tuple[str, ...],
    top: str,
    stored: Mapping[str, StoredLayer],
    known: Mapping[str, Layer],
    services: Services,
    report: Report,
) -> bool:
    found: list[str] = []
    used: list[str] = []
    try:
        for layer in layer_chain(top, dict(known)):
            parts = expanded(layer, known, lambda each: each in wanted)
            if parts is None:
                if has_data(services.layout.layer(layer)):
                    return False
                continue
            found += parts
            used += parts if parts == [layer] else []
        return tuple(found) == wanted and all([await _has_sha256(services, known[e], stored[e], report) for e in used])
    except (Vanished, AtollError, KeyError):
        # What is here is ill or going: the folder's is taken.
        return False


async def _has_sha256(services: Services, layer: Layer, stored: StoredLayer, report: Report) -> bool:
    if layer.sha256:
        return layer.sha256 == stored.sha256 and services.layout.layer(layer.id).exists()
    path: Path = services.layout.layer(layer.id)
    sha256, _ = await backup_files.read(path, total=Total(report, stored.size, "compare layers"))
    backup_files.note(services, layer.id, sha256)
    return sha256 == stored.sha256


def fitting_nics(backup: Backup, services: Services) -> tuple[NicSpec, ...]:
    """Its network cards: with their own addresses unless a VM here has them, without ports that are taken."""
    there = [nic for vm in services.records.vms() for spec in (vm.spec, vm.pending) if spec for nic in spec.nics]
    macs = {nic.mac for nic in there}
    taken = [port for nic in there for port in nic.ports]
    return tuple(
        replace(
            nic,
            address=None,
            mac=resolve.new_mac() if nic.mac in macs else nic.mac,
            ports=tuple(port for port in nic.ports if not any(_clash(port, other) for other in taken)),
        )
        for nic in networks.still_here(services, backup.spec.nics)
    )


def _clash(one: PortSpec, other: PortSpec) -> bool:
    everywhere = "0.0.0.0" in (one.host_address, other.host_address)
    same = everywhere or one.host_address == other.host_address
    return same and (one.host_port, one.protocol) == (other.host_port, other.protocol)
