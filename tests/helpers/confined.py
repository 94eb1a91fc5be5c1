"""Runs attacks behind barriers, in the jail of a real VM: `python -m tests.helpers.confined` with a `Trial` as JSON.

A process of its own, so that it can be another user's.
"""

import fcntl
import os
import resource
import select
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from atoll.host import cgroups, folder_server, helper_jail, kernel, sandbox
from atoll.host.jail import Jail, ServedFolder
from atoll.host.spawn import Program, spawn
from atoll.model.names import new_id
from tests.helpers import attacks

PYTHON = os.path.realpath("/usr/bin/python3")
LAYERS = ("no privileges", "namespaces and empty root", "own user", "system calls", "landlock", "limits")
"""What can be there alone. Without privileges is all of it; the others are each tried with that and nothing else."""


class Helper(msgspec.Struct, frozen=True, kw_only=True):
    """One of the programs beside QEMU."""

    kind: Literal["slirp4netns of a NIC", "slirp4netns of a network", "holder and dnsmasq", "relay", "SFTP server"]
    folder: str
    """In which it works, or which it reads or serves."""
    holder: int
    """Of a network that is up."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    vm_id: str
    memory: int
    disk_size: int
    disk: str
    """A file that the VM has open for writing."""
    layers: tuple[str, ...] = LAYERS
    namespaces: bool = True
    """False: on a host that refuses user namespaces to its users."""
    helper: Helper | None = None
    """As that one, not as a QEMU."""
    targets: dict[str, Any]
    filters: tuple[str, ...]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    missing: tuple[str, ...]
    """The barriers that this host hasn't got."""
    blocked: dict[str, str]
    """Each attack, and what came of it."""


def run(trial: Trial) -> Outcome:
    if not trial.namespaces:
        sandbox.usable_namespaces = lambda: kernel.Feature(usable=False, why="refused to this user")
    wanted = sandbox.Wanted(
        id=trial.vm_id, level="standard", memory=trial.memory + (576 << 20), threads=258, cpus=3,
        guest_data=max(trial.memory, trial.disk_size),
    )  # fmt: skip
    jail, missing = _jail(trial, wanted)
    # The stand-in is a Python program; all else is as it is for QEMU.
    library = f"/usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    jail = replace(_only(jail, trial.layers), programs=(*jail.programs, library))
    try:
        blocked = {name: _attack(name, jail, trial, wanted) for name in attacks.ATTACKS}
    finally:
        cgroups.remove(trial.vm_id)
    return Outcome(missing=missing, blocked=blocked)


def _jail(trial: Trial, wanted: sandbox.Wanted) -> tuple[Jail, tuple[str, ...]]:
    if trial.helper is not None:
        return _helper_jail(trial.helper)
    jail, isolation = sandbox.prepare(PYTHON, wanted)
    assert jail is not None
    return jail, tuple(barrier.name for barrier in isolation.missing)


def _helper_jail(helper: Helper) -> tuple[Jail, tuple[str, ...]]:
    folder = Path(helper.folder)
    match helper.kind:
        case "slirp4netns of a NIC":
            shut_in = helper_jail.for_user_network(PYTHON, folder=folder, files=("/etc/resolv.conf",))
            return shut_in.jail, (shut_in.weaker,) if shut_in.weaker else ()
        case "slirp4netns of a network":
            return helper_jail.for_uplink(PYTHON, network_id=new_id(), holder=helper.holder, folder=folder), ()
        case "holder and dnsmasq":
            return helper_jail.for_names((PYTHON,), network_id=new_id(), files=folder, ipv6=True), ()
        case "relay":
            return helper_jail.for_relay(PYTHON, holder=helper.holder), ()
        case "SFTP server":
            return folder_server.jail_for(ServedFolder(path=str(folder), read_only=False), PYTHON), ()


def _only(jail: Jail, layers: tuple[str, ...]) -> Jail:
    limits = [each for each in jail.limits if "limits" in layers or each[0] == resource.RLIMIT_NOFILE]
    return replace(
        jail,
        namespaces=jail.namespaces and LAYERS[1] in layers,
        user_namespace=jail.user_namespace and (LAYERS[1] in layers or "own user" in layers),
        ids=jail.ids if "own user" in layers else None,
        filtered=jail.filtered and "system calls" in layers,
        landlock=jail.landlock if "landlock" in layers else 0,
        limits=tuple(limits),
        groups=jail.groups if "limits" in layers else (),
        own_devices=jail.own_devices if LAYERS[1] in layers else (),
    )


def _attack(name: str, jail: Jail, trial: Trial, wanted: sandbox.Wanted) -> str:
    told, telling = os.pipe()
    hearing, saying = os.pipe()
    disk = os.open(trial.disk, os.O_RDWR)
    high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 20) for number in (told, saying, disk)]
    for number, target in zip(high, (3, 4, 5), strict=True):
        os.dup2(number, target)
    helper, most = trial.helper, sandbox.largest_file(wanted.guest_data)
    targets = trial.targets | {
        "attack": name, "disk_descriptor": 5, "memory": trial.memory,
        "threads": helper_jail.PROCESSES if helper else wanted.threads,
        "largest_file": helper_jail.LARGEST_LOG if helper else most,
        "filters": trial.filters if "system calls" in trial.layers else (),
        "sandbox": helper is not None and helper.kind == "slirp4netns of a network",
    }  # fmt: skip
    os.write(telling, msgspec.json.encode(targets))
    argv = (PYTHON, "-I", "-S", "-c", Path(attacks.__file__).read_text())
    program = Program(argv=argv, descriptors=(3, 4, 5), output=2, folder=helper.folder if helper else "/")
    process = os.pidfd_open(spawn(program, jail).pid)
    for number in (3, 4, 5):
        os.dup2(2, number)
    for number in (told, telling, saying, disk, *high):
        os.close(number)
    said = os.read(hearing, 1000).decode()
    os.close(hearing)
    # Until all its threads are gone: the next one has the same user, and that user's limits.
    select.select([process], [], [], 10)
    os.close(process)
    return said.strip() or "killed"


if __name__ == "__main__":
    # The numbers that the stand-in wants are taken, so that nothing else gets them.
    for wanted_number in (3, 4, 5):
        os.dup2(2, wanted_number)
    result = run(msgspec.json.decode(sys.stdin.buffer.read(), type=Trial))
    sys.stdout.buffer.write(msgspec.json.encode(result))
