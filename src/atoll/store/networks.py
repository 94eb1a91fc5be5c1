"""Networks in the database, and the cards of VMs on them: each address of a network is given once."""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from atoll.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from atoll.model.network import Attached, Network
from atoll.model.spec import NicSpec
from atoll.model.vm import Vm

_network = msgspec.json.Decoder(Network)
ATTACHED = (
    "SELECT network_id, vms.id, vms.name, nic, mac, address FROM nics JOIN vms ON vms.id = vm_id"
    " WHERE ? IS NULL OR network_id = ? ORDER BY vms.name, nic"
)


def read(rows: Iterable[Sequence[Any]]) -> list[Network]:
    return [_network.decode(row[0]) for row in rows]


def attached(rows: Iterable[Sequence[Any]]) -> dict[str, list[Attached]]:
    found: dict[str, list[Attached]] = {}
    for network, vm_id, vm, nic, mac, stored in rows:
        address = "" if stored == mac else stored
        found.setdefault(network, []).append(Attached(vm_id=vm_id, vm=vm, nic=nic, mac=mac, address=address))
    return found


def add(db: sqlite3.Connection, network: Network) -> None:
    if db.execute("SELECT 1 FROM networks WHERE name = ?", (network.name,)).fetchone():
        raise AlreadyExists(f"there is a network '{network.name}' already", next_step="Choose another name.")
    row = (network.id, network.name, network.created_at, msgspec.json.encode(network))
    db.execute("INSERT INTO networks VALUES (?, ?, ?, ?)", row)


def remove(db: sqlite3.Connection, network_id: str) -> None:
    if db.execute("SELECT 1 FROM nics WHERE network_id = ?", (network_id,)).fetchone():
        raise WrongState("the network is in use", "VMs have cards on it", "Detach them, or use --force.")
    db.execute("DELETE FROM networks WHERE id = ?", (network_id,))


def put_nics(db: sqlite3.Connection, vm: Vm) -> None:
    """Record the cards that the VM has now or at its next start. Raises `AlreadyExists`, `NotFound`, `InvalidInput`."""
    db.execute("DELETE FROM nics WHERE vm_id = ?", (vm.id,))
    specs = [spec for spec in (vm.spec, vm.pending) if spec is not None]
    cards = dict.fromkeys((nic.network, nic.name, nic.mac, nic.address) for spec in specs for nic in spec.nics)
    for network, name, mac, address in cards:
        if network:
            _put_nic(db, vm, network, NicSpec(name=name, mac=mac, address=address))


def _put_nic(db: sqlite3.Connection, vm: Vm, network: str, nic: NicSpec) -> None:
    found = db.execute("SELECT name, record FROM networks WHERE id = ?", (network,)).fetchone()
    if found is None:
        raise NotFound(
            f"{vm.name}: the network of its card '{nic.name}' is gone",
            "it was removed",
            "`atoll net ls` lists those that there are.",
        )
    if nic.address is None and _network.decode(found[1]).mode != "bridge":
        raise InvalidInput(f"{vm.name}: its card '{nic.name}' has no address on '{found[0]}'")
    # One whose address isn't ours to know stands there under its hardware address.
    address = nic.address or nic.mac
    for what, column in ((address, "address"), (nic.mac, "mac")):
        holder = db.execute(
            f"SELECT vms.name FROM nics JOIN vms ON vms.id = vm_id WHERE network_id = ? AND {column} = ?",
            (network, what),
        ).fetchone()
        if holder is not None:
            raise AlreadyExists(
                f"{vm.name}: {what} is taken on '{found[0]}'", f"'{holder[0]}' has it", "Choose another."
            )
    db.execute("INSERT INTO nics VALUES (?, ?, ?, ?, ?)", (vm.id, network, nic.name, nic.mac, address))
