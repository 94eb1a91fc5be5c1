"""All VMs as they are recorded, without decoding again what hasn't changed: decoding is most of what listing takes."""

import msgspec

from atoll.model.vm import Vm
from atoll.store.database import Database

_decode = msgspec.json.Decoder(Vm).decode
_ALL = "SELECT id, record FROM vms ORDER BY created_at, id"


class DecodedVms:
    """Remembers, for a process that lives long, each record with what it was decoded from."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._version: tuple[int, int] | None = None
        self._vms: list[Vm] = []
        self._by_id: dict[str, tuple[bytes, Vm]] = {}

    def all(self) -> list[Vm]:
        """Oldest first."""
        version = self._current_version()
        if version is None or version != self._version:
            before, now = self._by_id, {}
            for vm_id, record in self._db.rows(_ALL):
                known = before.get(vm_id)
                now[vm_id] = known if known is not None and known[0] == record else (record, _decode(record))
            self._by_id = now
            self._vms, self._version = [vm for _, vm in now.values()], version
        return list(self._vms)

    def _current_version(self) -> tuple[int, int] | None:
        """It differs whenever anybody has written since: the first number for others, the second for this connection.

        None inside a transaction, which may be rolled back.
        """
        connection = self._db.connection
        if connection.in_transaction:
            return None
        (others,) = connection.execute("PRAGMA data_version").fetchone()
        return int(others), connection.total_changes
