"""Serves a folder to a guest: OpenSSH's SFTP server on a socket whose other end QEMU has, shut in with that folder.

It ends with its socket, so with its QEMU, whatever ended that. Who it is follows from the folder: an ordinary user's is
that user, root's is the folder's owner.
"""

import os
import resource
import socket
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from atoll.errors import EngineFailed, InvalidInput, Unsupported
from atoll.host import facts, kernel, process, seccomp
from atoll.host.helper_jail import LARGEST_LOG
from atoll.host.jail import SHARED, Ids, Jail, ServedFolder
from atoll.host.sandbox import shown_libraries, usable_namespaces
from atoll.host.spawn import Program, spawn
from atoll.model.units import MIB

PROGRAM = "sftp-server"
_MEMORY = 256 * MIB


@dataclass(frozen=True)
class Served:
    """A folder that waits for its client."""

    link: socket.socket
    """The client's end."""
    process: facts.ProcessIdentity


def check_folder(path: str) -> None:
    """Raises `InvalidInput` unless it is a folder that this user can read, reached without symbolic links."""
    why = ""
    if not Path(path).is_dir():
        why = "it is a file" if Path(path).exists() else "there is no such folder"
    elif os.path.realpath(path) != path:
        why = f"a symbolic link leads to {os.path.realpath(path)} now"
    elif not os.access(path, os.R_OK | os.X_OK):
        why = "this user can't read it"
    if why:
        raise InvalidInput(f"the folder {path} can't be shared", why, "Check its path.")


def serve(folder: ServedFolder, *, log: Path, groups: tuple[str, ...] = ()) -> Served:
    """Start a server, in these control groups.

    Raises `InvalidInput` (the folder), `MissingTool`, `Unsupported`, `EngineFailed`.
    """
    check_folder(folder.path)
    program = process.find(PROGRAM)
    jail = replace(jail_for(folder, program), groups=groups)
    ours, theirs = socket.socketpair()
    try:
        with theirs, log.open("ab") as output:
            place = SHARED if jail.namespaces else folder.path
            # Its only message is the one with which it ends: a guest can't fill the log.
            words = (program, "-e", "-l", "FATAL", "-d", place, *(["-R"] if folder.read_only else []))
            spawned = spawn(
                Program(
                    argv=words,
                    descriptors=(),
                    input=theirs.fileno(),
                    output=theirs.fileno(),
                    errors=output.fileno(),
                    folder=str(log.parent),
                ),
                jail,
            )
        identity = facts.identity_of(spawned.pid)
        if identity is None:
            raise EngineFailed("the folder's server ended at once", f"see {log}", "Run `atoll doctor`.")
        return Served(link=ours, process=identity)
    except BaseException:
        ours.close()
        raise


def jail_for(folder: ServedFolder, program: str) -> Jail:
    """What shuts the server of this folder in. Raises `Unsupported`."""
    root, namespaces, landlock = os.geteuid() == 0, usable_namespaces(), kernel.landlock_version()
    if not namespaces.usable and not landlock:
        raise Unsupported(
            "folders can't be shared here",
            f"nothing would keep the guest in the folder: no namespaces ({namespaces.why}), no Landlock",
            "See `atoll doctor`.",
        )
    owner = Path(folder.path).stat()
    ids = Ids(user=owner.st_uid, group=owner.st_gid) if root else None
    # It asks who it is. In a user namespace an ordinary user is called 0.
    user, group = (0, 0) if ids is None else (ids.user, ids.group)
    programs = tuple(dict.fromkeys((*shown_libraries(), program, os.path.realpath(program))))
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, _MEMORY)]
    if folder.read_only:
        # It has nothing to write but its log.
        limits.append((resource.RLIMIT_FSIZE, LARGEST_LOG))
    return Jail(
        namespaces=namespaces.usable,
        user_namespace=namespaces.usable and not root,
        ids=ids,
        programs=programs if namespaces.usable else (*programs, "/etc/passwd"),
        served=folder,
        texts=(("/etc/passwd", f"share:x:{user}:{group}::/:/\n"),),
        landlock=landlock,
        filtered=kernel.seccomp_filters() and seccomp.known(),
        limits=tuple(limits),
    )
