"""Records in one SQLite file: WAL, full durability, numbered migrations.

Several processes use the file at once; each write is one short `BEGIN IMMEDIATE` transaction.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from atoll.errors import AlreadyExists, NotFound, RecordsFailed
from atoll.model.groups import Group
from atoll.model.image import Image, Layer
from atoll.model.network import Attached, Network
from atoll.model.operation import Operation
from atoll.model.snapshot import Snapshot
from atoll.model.vm import Event, Vm
from atoll.store import examine, history, image_names, networks
from atoll.store.database import Database
from atoll.store.decoded import DecodedVms
from atoll.store.failures import told
from atoll.store.records import Flaw, Readable

KEPT_OPERATIONS = 2000
KEPT_EVENTS = 20000

_vm = msgspec.json.Decoder(Vm)
_image = msgspec.json.Decoder(Image)
_layer = msgspec.json.Decoder(Layer)
_operation = msgspec.json.Decoder(Operation)
_event_data = msgspec.json.Decoder(dict[str, Any])
_encode = msgspec.json.Encoder().encode


class SqliteRecords:
    """The embedded `Records`."""

    def __init__(self, path: Path, *, wake: Path | None = None, reserve: Path | None = None) -> None:
        """Open the database, making or upgrading it. Raises `RecordsFailed` or `StorageFailed`.

        Where it can only be read (a full disk, another user's), what would change it raises.
        """
        self._path = path
        self._wake = wake
        self._db = Database(path, reserve=reserve)
        self._transaction, self._rows = self._db.transaction, self._db.rows
        self._vms = DecodedVms(self._db)

    def close(self) -> None:
        self._db.connection.close()

    # VMs

    def vms(self) -> list[Vm]:
        with told(self._path):
            return self._vms.all()

    def vm(self, vm_id: str) -> Vm | None:
        with told(self._path):
            rows = self._rows("SELECT record FROM vms WHERE id = ?", vm_id)
            return _vm.decode(rows[0][0]) if rows else None

    def called(self, reference: str) -> Vm | None:
        with told(self._path):
            query = "SELECT record FROM vms WHERE name = ? OR id = ? ORDER BY name = ? DESC LIMIT 1"
            rows = self._rows(query, reference, reference, reference)
            return _vm.decode(rows[0][0]) if rows else None

    def throwaways(self) -> list[Vm]:
        with told(self._path):
            return [_vm.decode(row[0]) for row in self._rows("SELECT record FROM vms WHERE throwaway")]

    def add_vm(self, vm: Vm, layers: Iterable[Layer] = (), snapshots: Iterable[Snapshot] = ()) -> None:
        with self._clashes_told(vm), self._transaction() as db:
            history.put_layers(db, layers)
            for snapshot in snapshots:
                history.put(db, snapshot)
            row = (vm.id, vm.name, vm.created_at, vm.remove_when_stopped, _encode(vm))
            db.execute("INSERT INTO vms VALUES (?, ?, ?, ?, ?)", row)
            self._put_ports(db, vm)
            networks.put_nics(db, vm)

    def put_vm(self, vm: Vm) -> None:
        with self._clashes_told(vm), self._transaction() as db:
            self._replace_vm(db, vm)

    def _replace_vm(self, db: sqlite3.Connection, vm: Vm) -> None:
        row = (vm.name, vm.remove_when_stopped, _encode(vm), vm.id)
        updated = db.execute("UPDATE vms SET name = ?, throwaway = ?, record = ? WHERE id = ?", row)
        if updated.rowcount == 0:
            raise NotFound(f"the VM '{vm.name}' is gone", "another process removed it")
        db.execute("DELETE FROM ports WHERE vm_id = ?", (vm.id,))
        self._put_ports(db, vm)
        networks.put_nics(db, vm)

    def remove_vm(self, vm_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM vms WHERE id = ?", (vm_id,))

    @staticmethod
    def _put_ports(db: sqlite3.Connection, vm: Vm) -> None:
        ports = [port for nic in vm.spec.nics for port in nic.ports]
        for port in ports:
            # 0.0.0.0 takes the port on every address, so it clashes with each of them.
            holder = db.execute(
                "SELECT vms.id, vms.name FROM ports JOIN vms ON vms.id = vm_id WHERE host_port = ? AND protocol = ?"
                " AND (host_address = ? OR host_address = '0.0.0.0' OR ? = '0.0.0.0')",
                (port.host_port, port.protocol, port.host_address, port.host_address),
            ).fetchone()
            if holder and holder[0] == vm.id:
                raise AlreadyExists(
                    f"{vm.name}: port {port.host_port} is published twice", next_step="Publish it once."
                )
            if holder:
                raise AlreadyExists(
                    f"{vm.name}: port {port.host_port} is taken by '{holder[1]}'",
                    next_step=f"Choose another with -p, or `atoll port rm {holder[1]} {port.host_port}`.",
                )
            db.execute(
                "INSERT INTO ports VALUES (?, ?, ?, ?)", (vm.id, port.host_address, port.host_port, port.protocol)
            )

    @contextlib.contextmanager
    def _clashes_told(self, vm: Vm) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise AlreadyExists(
                f"there is a VM '{vm.name}' already", next_step=f"Choose another name, or `atoll rm {vm.name}` first."
            ) from error

    # Snapshots

    def snapshots(self, vm_id: str | None = None) -> list[Snapshot]:
        where, values = ("WHERE vm_id = ?", (vm_id,)) if vm_id is not None else ("", ())
        with told(self._path):
            return history.read(self._rows(f"SELECT record FROM snapshots {where} ORDER BY created_at, id", *values))

    def snapshot(self, snapshot_id: str) -> Snapshot | None:
        with told(self._path):
            return next(iter(history.read(self._rows("SELECT record FROM snapshots WHERE id = ?", snapshot_id))), None)

    def freeze(self, vm: Vm, layers: Iterable[Layer], snapshot: Snapshot | None = None) -> None:
        with self._clashes_told(vm), self._transaction() as db:
            history.put_layers(db, layers)
            self._replace_vm(db, vm)
            if snapshot is not None:
                history.put(db, snapshot)

    def put_in_place(self, layer: Layer, *, of: str) -> None:
        with self._transaction() as db:
            history.put_in_place(db, layer, of=of)

    def put_snapshot(self, snapshot: Snapshot, layers: Iterable[Layer] = ()) -> None:
        with self._transaction() as db:
            history.put_layers(db, layers)
            history.put(db, snapshot)

    def remove_snapshot(self, snapshot_id: str) -> None:
        with self._transaction() as db:
            history.remove(db, snapshot_id)

    # Images and layers

    def images(self) -> list[Image]:
        with told(self._path):
            return [_image.decode(row[0]) for row in self._rows("SELECT record FROM images ORDER BY created_at, id")]

    def image(self, image_id: str) -> Image | None:
        with told(self._path):
            rows = self._rows("SELECT record FROM images WHERE id = ?", image_id)
            return _image.decode(rows[0][0]) if rows else None

    def add_image(self, image: Image, layers: Iterable[Layer]) -> None:
        with self._transaction() as db:
            history.put_layers(db, layers)
            db.execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?)", (image.id, image.created_at, _encode(image)))
            image_names.take(db, image, [image.name, *image.tags])

    def put_image_names(self, image_id: str, names: Iterable[str]) -> Image:
        with self._transaction() as db:
            row = db.execute("SELECT record FROM images WHERE id = ?", (image_id,)).fetchone()
            if row is None:
                raise NotFound(f"there is no image '{image_id}'", next_step="`atoll image ls` lists what there is.")
            first, *others = names
            image = msgspec.structs.replace(_image.decode(row[0]), name=first, tags=tuple(others))
            db.execute("UPDATE images SET record = ? WHERE id = ?", (_encode(image), image_id))
            image_names.take(db, image, [first, *others])
            return image

    def remove_image(self, image_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM images WHERE id = ?", (image_id,))

    def layers(self) -> list[Layer]:
        with told(self._path):
            return [_layer.decode(row[0]) for row in self._rows("SELECT record FROM layers ORDER BY id")]

    def layer(self, layer_id: str) -> Layer | None:
        with told(self._path):
            rows = self._rows("SELECT record FROM layers WHERE id = ?", layer_id)
            return _layer.decode(rows[0][0]) if rows else None

    def note_sha256(self, layer_id: str, sha256: str) -> None:
        with self._transaction() as db:
            history.note_sha256(db, layer_id, sha256)

    def put_layers(self, layers: Iterable[Layer]) -> None:
        with self._transaction() as db:
            history.put_layers(db, layers)

    def remove_layers(self, layer_ids: Iterable[str]) -> None:
        with self._transaction() as db:
            db.executemany("DELETE FROM layers WHERE id = ?", [(layer_id,) for layer_id in layer_ids])

    # Networks

    def networks(self) -> list[Network]:
        with told(self._path):
            return networks.read(self._rows("SELECT record FROM networks ORDER BY created_at, id"))

    def network(self, network_id: str) -> Network | None:
        with told(self._path):
            rows = self._rows("SELECT record FROM networks WHERE id = ?", network_id)
            return next(iter(networks.read(rows)), None)

    def add_network(self, network: Network) -> None:
        with self._transaction() as db:
            networks.add(db, network)

    def remove_network(self, network_id: str) -> None:
        with self._transaction() as db:
            networks.remove(db, network_id)

    def attached(self, network_id: str | None = None) -> dict[str, list[Attached]]:
        with told(self._path):
            return networks.attached(self._rows(networks.ATTACHED, network_id, network_id))

    def groups(self) -> list[Group]:
        with told(self._path):
            return networks.read_groups(self._rows("SELECT record FROM security_groups ORDER BY name"))

    def put_group(self, group: Group) -> None:
        with self._transaction() as db:
            networks.put_group(db, group)

    def remove_group(self, name: str) -> None:
        with self._transaction() as db:
            networks.remove_group(db, name)

    # For fsck

    def readable(self) -> Readable:
        with told(self._path):
            return examine.readable(self._db.connection)

    def flaws(self, *, quick: bool) -> list[Flaw]:
        with told(self._path):
            return examine.flaws(self._db.connection, quick=quick)

    def mend(self) -> None:
        try:
            with self._transaction() as db:
                examine.mend(db)
        except sqlite3.IntegrityError as error:
            raise RecordsFailed(f"the records in {self._path} can't be mended", str(error)) from error

    # The journal

    def operations(self, *, unfinished: bool = False, limit: int = 200) -> list[Operation]:
        where = "WHERE state IN ('running', 'undoing', 'stuck')" if unfinished else ""
        with told(self._path):
            rows = self._rows(f"SELECT record FROM operations {where} ORDER BY created_at DESC, id LIMIT ?", limit)
            return [_operation.decode(row[0]) for row in rows]

    def operation(self, operation_id: str) -> Operation | None:
        with told(self._path):
            rows = self._rows("SELECT record FROM operations WHERE id = ?", operation_id)
            return _operation.decode(rows[0][0]) if rows else None

    def put_operation(self, operation: Operation, *, durable: bool = True) -> None:
        with self._transaction(durable=durable) as db:
            row = db.execute("SELECT record FROM operations WHERE id = ?", (operation.id,)).fetchone()
            if row is not None and _operation.decode(row[0]).cancel_requested:
                operation = msgspec.structs.replace(operation, cancel_requested=True)
            db.execute(
                "INSERT OR REPLACE INTO operations VALUES (?, ?, ?, ?, ?)",
                (operation.id, operation.subject, operation.state, operation.created_at, _encode(operation)),
            )
            if row is None:
                self._forget_old(db)

    def request_cancel(self, operation_id: str) -> None:
        with self._transaction() as db:
            row = db.execute("SELECT record FROM operations WHERE id = ?", (operation_id,)).fetchone()
            if row is None:
                raise NotFound(f"there is no operation '{operation_id}'", next_step="`atoll operation ls` lists them.")
            operation = msgspec.structs.replace(_operation.decode(row[0]), cancel_requested=True)
            db.execute("UPDATE operations SET record = ? WHERE id = ?", (_encode(operation), operation_id))
        self._touch_wake()

    @staticmethod
    def _forget_old(db: sqlite3.Connection) -> None:
        # The plus keeps SQLite from looking at all that are done, by the index of states.
        db.execute(
            "DELETE FROM operations WHERE +state IN ('done', 'undone') AND created_at <"
            " (SELECT created_at FROM operations ORDER BY created_at DESC LIMIT 1 OFFSET ?)",
            (KEPT_OPERATIONS - 1,),
        )

    # Events

    def add_event(
        self,
        kind: str,
        *,
        vm_id: str | None = None,
        name: str = "",
        data: dict[str, Any] | None = None,
        durable: bool = True,
    ) -> Event:
        at = time.time()
        with self._transaction(durable=durable) as db:
            cursor = db.execute(
                "INSERT INTO events (at, kind, vm_id, name, data) VALUES (?, ?, ?, ?, ?)",
                (at, kind, vm_id, name, _encode(data or {})),
            )
            number = cursor.lastrowid or 0
            db.execute("DELETE FROM events WHERE id <= ?", (number - KEPT_EVENTS,))
        self._touch_wake()
        return Event(id=number, at=at, kind=kind, vm_id=vm_id, name=name, data=data or {})

    def events(self, *, after: int = 0, limit: int = 1000) -> list[Event]:
        rows = self._rows(
            "SELECT id, at, kind, vm_id, name, data FROM events WHERE id > ? ORDER BY id LIMIT ?", after, limit
        )
        with told(self._path):
            return [
                Event(id=number, at=at, kind=kind, vm_id=vm_id, name=name, data=_event_data.decode(data))
                for number, at, kind, vm_id, name, data in rows
            ]

    def last_event(self) -> int:
        return int(self._rows("SELECT coalesce(max(id), 0) FROM events")[0][0])

    def _touch_wake(self) -> None:
        """Best effort: a follower that isn't woken still finds the event at its next look."""
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                descriptor = os.open(self._wake, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.write(descriptor, b".")
                os.close(descriptor)
