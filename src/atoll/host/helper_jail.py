"""How the programs beside QEMU are shut in: those that speak for guests on a network, and see what guests send.

As QEMU itself (`sandbox.py`), but that most keep a network and may make sockets.
"""

import os
import resource
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from atoll.errors import NetworkFailed
from atoll.host import cgroups, kernel, seccomp
from atoll.host.jail import DEVICES, Ids, Jail
from atoll.host.sandbox import own_ids, shown_libraries, shown_python, usable_namespaces, without_ids
from atoll.model.units import GIB, MIB

CAP_SETPCAP, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN = 8, 10, 12, 13, 21
TUN = "/dev/net/tun"
PROCESSES = 256
"""None has more than ten. But who has ended counts until somebody has taken note of that, which may be nobody."""
CONNECTIONS = 2048
"""Descriptors that it may have. Slirp keeps up to 256 KiB for each connection, so these come to their end first."""
MEMORY, STACK, LARGEST_LOG = 1 * GIB, 2 * MIB, 1 * MIB
OF_A_NETWORK = cgroups.Wanted(processes=1024, cpus=2, weight=50, memory=2 * GIB)
"""All that serve one network, together: where there isn't enough for all, VMs come first."""


class HelperJail(Struct, frozen=True, kw_only=True):
    jail: Jail
    weaker: str
    """What the helper isn't kept in by, and why; empty when all is as it should be."""


def for_user_network(
    binary: str, *, folder: Path, files: Sequence[str] = (), groups: tuple[str, ...] = ()
) -> HelperJail:
    """The jail for a helper that works in `folder`, which is its own, and may read these files besides.

    `groups` are control groups' entrances. Root's may have ports below 1024.
    """
    namespaces, root = usable_namespaces(), os.geteuid() == 0
    # Another user each time: two that run at once have nothing to do with each other.
    seed = secrets.token_hex(4)
    ids = own_ids(seed) if namespaces.usable and not without_ids(seed) else None
    jail = _jail(
        (binary, *files),
        namespaces=namespaces.usable,
        user_namespace=namespaces.usable and not root,
        ids=ids,
        host_network=True,
        capabilities=(CAP_NET_BIND_SERVICE,) if root else (),
        folder=str(folder),
        groups=groups,
    )
    return HelperJail(jail=jail, weaker="" if namespaces.usable else f"it has no root of its own: {namespaces.why}")


def for_names(
    programs: Sequence[str], *, network_id: str, files: Path, ipv6: bool, groups: tuple[str, ...] = ()
) -> Jail:
    """The jail in which a network's names and addresses are told: a network of its own, and these files.

    Its user namespace is the network's as well. Raises `NetworkFailed` where there are no namespaces.
    """
    namespaces = usable_namespaces()
    if not namespaces.usable:
        raise NetworkFailed("a network can't be made", namespaces.why, "Run `atoll doctor`.")
    ids = None if without_ids(network_id) else own_ids(network_id)
    return _jail(
        (*programs, str(files)),
        namespaces=True,
        user_namespace=True,
        ids=ids,
        # In that network alone. dnsmasq insists on the second one for DHCP, though it doesn't use it; the third one is
        # for router advertisements.
        capabilities=(CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, *((CAP_NET_RAW,) if ipv6 else ())),
        groups=groups,
    )


def for_uplink(binary: str, *, network_id: str, holder: int, folder: Path, groups: tuple[str, ...] = ()) -> Jail:
    """The jail for a network's way out, which opens a tap in the network's namespace before it drops the privileges for
    that. Root's is outside of the holder's user namespace: in there it couldn't have ports below 1024.
    """
    root = os.geteuid() == 0
    ids = uplink_ids(network_id, holder)
    return _jail(
        (binary, "/etc/resolv.conf"),
        namespaces=True,
        user_namespace=not root,
        joined=0 if root else holder,
        ids=ids,
        host_network=True,
        capabilities=(CAP_SETPCAP, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_SYS_ADMIN),
        devices=(*DEVICES, TUN),
        # A computer without udev has one that is root's alone.
        own_devices=(TUN,) if root else (),
        folder=str(folder),
        nests=True,
        groups=groups,
    )


def for_relay(python: str, *, holder: int, groups: tuple[str, ...] = ()) -> Jail:
    """The jail for a bad cable, in the network's user namespace: it has both ends open, and makes and opens nothing."""
    return _jail(
        (*shown_python(python), python),
        namespaces=True,
        user_namespace=True,
        joined=holder,
        ids=_ids_in(holder),
        sockets=False,
        groups=groups,
    )


def uplink_ids(network_id: str, holder: int) -> Ids | None:
    """The uplink's user: for root one that is neither a VM's nor the holder's, else the one that the holder's user
    namespace has besides this user.
    """
    if os.geteuid() == 0:
        seed = network_id[8:]
        return None if without_ids(seed) else own_ids(seed)
    return _ids_in(holder)


def _ids_in(holder: int) -> Ids | None:
    """The user that the holder's user namespace has besides the one who made it."""
    lines = [line.split() for line in Path(f"/proc/{holder}/uid_map").read_text().splitlines()]
    user = next((int(outside) for inside, outside, _ in lines if inside == "1"), None)
    return None if user is None else Ids(user=user, group=user)


def _jail(shown: Sequence[str], *, ids: Ids | None, user_namespace: bool, sockets: bool = True, **others: Any) -> Jail:
    """With what is the same for all."""
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, LARGEST_LOG),
        (resource.RLIMIT_STACK, STACK),
        (resource.RLIMIT_NOFILE, CONNECTIONS),
        (resource.RLIMIT_DATA, MEMORY),
    ]
    if ids is not None or user_namespace:
        # No process of others counts as one of its own.
        limits.append((resource.RLIMIT_NPROC, PROCESSES))
    return Jail(
        ids=ids,
        user_namespace=user_namespace,
        programs=_with_targets(shown),
        sockets=sockets,
        landlock=kernel.landlock_version(),
        filtered=kernel.seccomp_filters() and seccomp.known(),
        limits=tuple(limits),
        **others,
    )


def _with_targets(shown: Sequence[str]) -> tuple[str, ...]:
    """Files, what links among them lead to, and the libraries of programs."""
    both = dict.fromkeys([*shown_libraries(), *(path for each in shown for path in (each, os.path.realpath(each)))])
    return tuple(path for path in both if os.path.lexists(path))
