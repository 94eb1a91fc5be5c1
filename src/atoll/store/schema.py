"""The database's numbered migrations. A migration that has shipped is never edited: add the next one."""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE vms (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_at REAL NOT NULL,
        throwaway INTEGER NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    CREATE INDEX vms_throwaway ON vms(throwaway) WHERE throwaway;
    CREATE TABLE ports (
        vm_id TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        host_address TEXT NOT NULL,
        host_port INTEGER NOT NULL,
        protocol TEXT NOT NULL,
        PRIMARY KEY (host_address, host_port, protocol)
    ) STRICT;
    CREATE INDEX ports_by_vm ON ports(vm_id);
    CREATE TABLE layers (id TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
    CREATE TABLE images (
        id TEXT PRIMARY KEY,
        created_at REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    CREATE TABLE image_names (
        name TEXT PRIMARY KEY,
        image_id TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE
    ) STRICT;
    CREATE TABLE operations (
        id TEXT PRIMARY KEY,
        subject TEXT NOT NULL,
        state TEXT NOT NULL,
        created_at REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    CREATE INDEX operations_by_state ON operations(state);
    CREATE INDEX operations_by_time ON operations(created_at);
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        kind TEXT NOT NULL,
        vm_id TEXT,
        name TEXT NOT NULL,
        data BLOB NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        vm_id TEXT NOT NULL,
        name TEXT NOT NULL,
        created_at REAL NOT NULL,
        record BLOB NOT NULL,
        UNIQUE (vm_id, name)
    ) STRICT;
    """,
    # What a copy still has to learn is written in a file beside its disks.
    """
    UPDATE vms SET record = CAST(json_remove(CAST(record AS TEXT), '$.cloned') AS BLOB);
    """,
    # A card that the running VM has and the next start hasn't, or the other way round, keeps its addresses too.
    """
    CREATE TABLE networks (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_at REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    CREATE TABLE nics (
        vm_id TEXT NOT NULL REFERENCES vms(id) ON DELETE CASCADE,
        network_id TEXT NOT NULL REFERENCES networks(id),
        nic TEXT NOT NULL,
        mac TEXT NOT NULL,
        address TEXT NOT NULL,
        PRIMARY KEY (network_id, address),
        UNIQUE (network_id, mac)
    ) STRICT;
    CREATE INDEX nics_by_vm ON nics(vm_id);
    """,
    """
    CREATE TABLE security_groups (
        name TEXT PRIMARY KEY,
        created_at REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    ALTER TABLE nics ADD COLUMN security_groups TEXT NOT NULL DEFAULT '';
    ALTER TABLE nics ADD COLUMN rate INTEGER NOT NULL DEFAULT 0;
    """,
)
