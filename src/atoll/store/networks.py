"""Networks and security groups in the database, and the cards of VMs: each address of a network is given once."""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from atoll.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from atoll.model import groups
from atoll.model.groups import Group
from atoll.model.network import Attached, Network
from atoll.model.spec import NicSpec
from atoll.model.vm import Vm

_network, _group = msgspec.json.Decoder(Network), msgspec.json.Decoder(Group)
_labels = msgspec.json.Decoder(dict[str, str])
ATTACHED = (
    "SELECT network_id, vms.id, vms.name, nic, mac, address, security_groups, rate,"
    " coalesce(json_extract(CAST(vms.record AS TEXT), '$.labels'), '{}'),"
    " json_extract(CAST(networks.record AS TEXT), '$.subnet6')"
    " FROM nics JOIN vms ON vms.id = vm_id JOIN networks ON networks.id = network_id"
    " WHERE ? IS NULL OR network_id = ? ORDER BY vms.name, nic"
)


def read(rows: Iterable[Sequence[Any]]) -> list[Network]:
    return [_network.decode(row[0]) for row in rows]


def attached(rows: Iterable[Sequence[Any]]) -> dict[str, list[Attached]]:
    found: dict[str, list[Attached]] = {}
    for network, vm_id, vm, nic, mac, stored, named, limit, labels, subnet6 in rows:
        card = Attached(
            vm_id=vm_id, vm=vm, nic=nic, mac=mac, address="" if stored == mac else stored,
            groups=tuple(named.split()), limit=limit, labels=_labels.decode(labels),
            address6=_address6(subnet6, mac),
        )  # fmt: skip
        found.setdefault(network, []).append(card)
    return found


def _address6(subnet6: str | None, mac: str) -> str:
    if subnet6 is None:
        return ""
    from atoll.model import subnets

    return subnets.address6(subnet6, mac)


def read_groups(rows: Iterable[Sequence[Any]]) -> list[Group]:
    return [_group.decode(row[0]) for row in rows]


def put_group(db: sqlite3.Connection, group: Group) -> None:
    """Raises `NotFound` when its rules mean a group that isn't there."""
    row = (group.name, group.created_at, msgspec.json.encode(group))
    db.execute("INSERT OR REPLACE INTO security_groups VALUES (?, ?, ?)", row)
    for name in sorted(groups.named(group.rules)):
        if not db.execute("SELECT 1 FROM security_groups WHERE name = ?", (name,)).fetchone():
            raise NotFound(f"there is no security group '{name}'", next_step="`atoll net group ls` lists them.")


def remove_group(db: sqlite3.Connection, name: str) -> None:
    """Raises `WrongState` while cards have it or other groups mean it."""
    cards = db.execute("SELECT DISTINCT vms.name, security_groups FROM nics JOIN vms ON vms.id = vm_id").fetchall()
    users = sorted({vm for vm, named in cards if name in named.split()})
    records = db.execute("SELECT record FROM security_groups WHERE name != ?", (name,)).fetchall()
    users += [f"the group {each.name}" for each in read_groups(records) if name in groups.named(each.rules)]
    if users:
        raise WrongState(
            f"the security group '{name}' is in use",
            f"{', '.join(users)} {'has' if len(users) == 1 else 'have'} it",
            "Give cards others with `atoll net set`, and groups with `atoll net group set`.",
        )
    db.execute("DELETE FROM security_groups WHERE name = ?", (name,))


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
    cards = {(nic.network, nic.name, nic.mac, nic.address): nic for spec in reversed(specs) for nic in spec.nics}
    for nic in cards.values():
        if nic.network:
            _put_nic(db, vm, nic.network, nic)


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
    row = (vm.id, network, nic.name, nic.mac, address, " ".join(nic.groups), nic.limit)
    db.execute("INSERT INTO nics VALUES (?, ?, ?, ?, ?, ?, ?)", row)
