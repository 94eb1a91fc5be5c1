"""Folders of this computer in guests: what was asked for made into specs, and what is known of their servers."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import AlreadyExists, InvalidInput, Unsupported
from atoll.host import facts, folder_server
from atoll.layout import VmPaths
from atoll.model.requests import CreateRequest, ShareRequest
from atoll.model.spec import ShareSpec, VmSpec
from atoll.model.state import Phase
from atoll.model.vm import ShareInfo, ShareState, Vm
from atoll.operations import observe
from atoll.qemu import devices

MOST = devices.MOST_PORTS - len(devices.channel_names())
"""Shares of one VM: the ports that are left."""


class Server(Struct, frozen=True, kw_only=True):
    """What serves a folder, as a file in the VM's run folder remembers it."""

    process: facts.ProcessIdentity
    at: float
    """When it was started."""
    folder: tuple[int, int] = (0, 0)
    """The folder that it serves, by device and inode: another one may have its name by now."""
    mounted: bool = False


def with_shares(spec: VmSpec, request: CreateRequest) -> VmSpec:
    """The machine with the folders that the request lists. Raises `InvalidInput`, `AlreadyExists`, `Unsupported`."""
    for wanted in request.shares:
        spec = replace(spec, shares=(*spec.shares, share(wanted, spec.shares)))
    if spec.shares:
        check_agent(spec, "the image")
    return spec


def check_agent(spec: VmSpec, what: str) -> None:
    """Raises `Unsupported` for a guest that can't be told to mount anything."""
    if not spec.guest.agent:
        raise Unsupported(
            f"{what} has no guest agent, so no folder can be shared with it",
            "the agent mounts it",
            "Install qemu-guest-agent and sshfs in it, then `atoll set VM --agent`; or copy with `atoll cp`.",
        )


def share(request: ShareRequest, there: Sequence[ShareSpec]) -> ShareSpec:
    """A further one. Raises `InvalidInput`, `AlreadyExists` for a second one at its place in the guest."""
    host = os.path.realpath(os.path.expanduser(request.host_path))  # noqa: PTH111
    for path in (host, request.guest_path):
        if not path.isprintable():
            raise InvalidInput(f"{path!r} can't be shared", "its name has control characters", "Rename it.")
    folder_server.check_folder(host)
    guest = _guest_path(request.guest_path)
    if any(each.guest_path == guest for each in there if each.host_path):
        raise AlreadyExists(f"a folder is shared at {guest} already", next_step="Take it away, or choose another path.")
    free = set(range(MOST)) - {each.number for each in there}
    if not free:
        raise InvalidInput(
            f"{MOST + 1} folders can't be shared",
            f"a VM has ports for {MOST}",
            "Share a folder that has several in it.",
        )
    return ShareSpec(number=min(free), host_path=host, guest_path=guest, read_only=request.read_only)


def _guest_path(text: str) -> str:
    path = PurePosixPath(text)
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or text.startswith("//"):
        raise InvalidInput(
            f"'{text}' is no place for a folder in the guest",
            "it has to be an absolute path below /, without ..",
            "Write it like /mnt/data.",
        )
    return str(path)


def all_shares(vm: Vm) -> tuple[ShareSpec, ...]:
    """Those of the next start, and those that a running VM keeps until then."""
    later = vm.pending.shares if vm.pending is not None else ()
    return (*vm.spec.shares, *(each for each in later if each not in vm.spec.shares))


def at_boot(spec: VmSpec) -> VmSpec:
    """Without the ports that only memory knows."""
    return replace(spec, shares=tuple(each for each in spec.shares if each.host_path))


def with_known_ports(wanted: Sequence[ShareSpec], known: Sequence[ShareSpec]) -> tuple[ShareSpec, ...]:
    """What is to be shared, and mere ports for what memory knows besides."""
    shared = [each for each in wanted if each.host_path]
    numbers = {each.number for each in shared}
    return (*shared, *(replace(each, host_path="") for each in known if each.number not in numbers))


def server_of(paths: VmPaths, each: ShareSpec) -> Server | None:
    """The last one; it may have ended."""
    try:
        return msgspec.json.decode(paths.share(each.number).read_bytes(), type=Server)
    except (OSError, msgspec.DecodeError):
        return None


def is_mounted(paths: VmPaths, each: ShareSpec) -> bool:
    server = server_of(paths, each)
    return server is not None and facts.is_alive(server.process) and _has_it(paths, each, server)


def folder_at(path: str) -> tuple[int, int] | None:
    """Which folder this is; None when there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _has_it(paths: VmPaths, each: ShareSpec, server: Server) -> bool:
    """Whether the guest has mounted it as it is there now, and hasn't rebooted by itself since."""
    if server.folder != folder_at(each.host_path):
        return False
    resets = [event["timestamp"]["seconds"] for event in observe.events_of_last_run(paths) if event["event"] == "RESET"]
    return server.mounted and not any(at > server.at for at in resets)


def infos(vm: Vm, phase: Phase, paths: VmPaths) -> tuple[ShareInfo, ...]:
    """What is told of a VM's shares."""
    return tuple(
        ShareInfo(
            host_path=each.host_path,
            guest_path=each.guest_path,
            read_only=each.read_only,
            state=_state(each, phase, paths),
        )
        for each in all_shares(vm)
        if each.host_path
    )


def _state(each: ShareSpec, phase: Phase, paths: VmPaths) -> ShareState:
    if phase in (Phase.STOPPED, Phase.SUSPENDED):
        return "stopped"
    server = server_of(paths, each)
    if server is None:
        return "not-mounted"
    if not facts.is_alive(server.process):
        return "ended"
    return "shared" if _has_it(paths, each, server) else "not-mounted"
