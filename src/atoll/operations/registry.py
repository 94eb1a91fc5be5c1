"""All journalled verbs by name, for recovery and for `operation retry` and `cancel`."""

from typing import Any

from atoll.operations import (
    backup,
    backup_restore,
    clone,
    configure,
    create,
    disk,
    export,
    images,
    import_bundle,
    merge,
    network,
    network_nics,
    pool,
    ports,
    power,
    remove,
    rename,
    restore,
    share,
    snapshot,
    start,
    stop,
    suspend,
)
from atoll.operations.engine import Verb

VERBS: dict[str, Verb[Any]] = {
    verb.name: verb
    for verb in (
        create.CREATE,
        start.START,
        stop.STOP,
        power.PAUSE,
        power.RESUME,
        remove.REMOVE,
        rename.RENAME,
        configure.SET,
        ports.PUBLISH,
        ports.UNPUBLISH,
        disk.ADD,
        disk.REMOVE,
        disk.RESIZE,
        share.ADD,
        share.REMOVE,
        network.CREATE,
        network.REMOVE,
        network_nics.ATTACH,
        network_nics.DETACH,
        images.MAKE,
        snapshot.SNAPSHOT,
        restore.RESTORE,
        clone.CUT,
        suspend.SUSPEND,
        pool.TAKE,
        merge.MERGE,
        backup.BACKUP,
        backup_restore.RESTORE_BACKUP,
        export.EXPORT,
        import_bundle.IMPORT,
    )
}
