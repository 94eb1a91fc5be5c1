"""How the programs beside QEMU are shut in: those that speak for guests on a network, and see what guests send.

As QEMU itself (`sandbox.py`), but that they keep a network and may make sockets.
"""

import os
import resource
import secrets
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from atoll.host import kernel, seccomp
from atoll.host.jail import Jail
from atoll.host.sandbox import own_ids, shown_libraries, usable_namespaces, without_ids
from atoll.model.units import GIB, MIB

CAP_NET_BIND_SERVICE = 10
PROCESSES = 64
"""Slirp has two for a moment, then one."""
CONNECTIONS = 2048
"""Descriptors that it may have. Slirp keeps up to 256 KiB for each connection, so these come to their end first."""
MEMORY, STACK, LARGEST_LOG = 1 * GIB, 2 * MIB, 1 * MIB


class HelperJail(Struct, frozen=True, kw_only=True):
    jail: Jail
    weaker: str
    """What the helper isn't kept in by, and why; empty when all is as it should be."""


def prepare(binary: str, *, folder: Path, files: Sequence[str] = (), groups: tuple[str, ...] = ()) -> HelperJail:
    """The jail for a helper that works in `folder`, which is its own, and may read these files besides.

    `groups` are control groups' entrances. Root's may have ports below 1024.
    """
    namespaces = usable_namespaces()
    root = os.geteuid() == 0
    # Another user each time: one that has just ended counts as a process until somebody has taken note of its end.
    seed = secrets.token_hex(4)
    alone = namespaces.usable and not without_ids(seed)
    jail = Jail(
        namespaces=namespaces.usable,
        user_namespace=namespaces.usable and not root,
        ids=own_ids(seed) if alone else None,
        programs=_shown(binary, files),
        networked=True,
        capabilities=(CAP_NET_BIND_SERVICE,) if root else (),
        folder=str(folder),
        landlock=kernel.landlock_version(),
        filtered=kernel.seccomp_filters() and seccomp.known(),
        limits=_limits(counted=alone or (namespaces.usable and not root)),
        groups=groups,
    )
    return HelperJail(jail=jail, weaker="" if namespaces.usable else f"it has no root of its own: {namespaces.why}")


def _shown(binary: str, files: Sequence[str]) -> tuple[str, ...]:
    shown = dict.fromkeys([*shown_libraries(), binary, os.path.realpath(binary)])
    for file in files:
        # A link, and what it leads to.
        shown |= dict.fromkeys([file, os.path.realpath(file)])
    return tuple(path for path in shown if os.path.lexists(path))


def _limits(*, counted: bool) -> tuple[tuple[int, int], ...]:
    """`counted`: no process of others counts as one of its own."""
    limits = (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, LARGEST_LOG),
        (resource.RLIMIT_STACK, STACK),
        (resource.RLIMIT_NOFILE, CONNECTIONS),
        (resource.RLIMIT_DATA, MEMORY),
    )
    return (*limits, (resource.RLIMIT_NPROC, PROCESSES)) if counted else limits
