"""Does what a `LaunchPlan` says: opens files, binds sockets, starts QEMU shut in with exactly those descriptors."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import StorageFailed, Unsupported, from_os_error
from atoll.host import user_network
from atoll.host.jail import Jail
from atoll.host.sockets import listen
from atoll.host.spawn import Program, spawn
from atoll.model.launch import LaunchPlan, Network, UserNetwork

_FLAGS = {
    "read": os.O_RDONLY,
    "read-write": os.O_RDWR,
    # Write-only, as QEMU asks of a descriptor for a log: the access modes have to match exactly.
    "append": os.O_WRONLY | os.O_APPEND | os.O_CREAT,
}


@dataclass(frozen=True)
class Launched:
    pid: int
    no_ids: str
    """Why it has no user of its own though the jail has one for it; else empty."""
    weaker: tuple[str, ...]
    """A sentence about each helper that is confined less than it should be."""


def launch(
    plan: LaunchPlan, *, log: Path, jail: Jail | None, strict: bool, given: Mapping[str, int] | None = None
) -> Launched:
    """Start QEMU in a session of its own, with its output in `log`. It outlives us.

    `given` has descriptors by name that are open already: taps, and networks of a VM that slept.

    Raises `StorageFailed` when a file can't be opened, `EngineFailed` or `MissingTool` when a program can't be
    started, `AlreadyExists` when a port is taken.
    """
    weaker: list[str] = []
    with contextlib.ExitStack() as stack:
        groups = jail.groups if jail is not None else ()
        had = dict(given or {})
        descriptors = dict(_open_all(plan, stack, weaker, groups, had)) | had
        if strict and weaker:
            raise Unsupported("the isolation 'strict' isn't possible here", "; ".join(weaker), "See `atoll doctor`.")
        output = stack.enter_context(log.open("ab"))
        program = Program(
            argv=(plan.binary, *(_fill(word, descriptors) for word in plan.argv)),
            descriptors=tuple(descriptors.values()),
            shown=tuple(descriptors[file.name] for file in plan.files if file.by_path),
            output=output.fileno(),
            folder=plan.working_folder,
        )
        spawned = spawn(program, jail)
        return Launched(pid=spawned.pid, no_ids=spawned.no_ids, weaker=tuple(weaker))


def _open_all(
    plan: LaunchPlan,
    stack: contextlib.ExitStack,
    weaker: list[str],
    groups: tuple[str, ...],
    had: Mapping[str, int],
) -> Iterator[tuple[str, int]]:
    for file in plan.files:
        try:
            descriptor = os.open(file.path, _FLAGS[file.access] | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            raise StorageFailed(
                f"{file.path} is not there",
                f"it is needed as '{file.name}'",
                "`atoll fsck` tells what else needs it, and what can be done.",
            ) from error
        except OSError as error:
            raise from_os_error(error, f"open {file.path}") from error
        stack.callback(os.close, descriptor)
        yield file.name, descriptor
    for listener in plan.listeners:
        server = stack.enter_context(listen(Path(listener.path)))
        yield listener.name, server.fileno()
    for feed in plan.feeds:
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        os.write(writing, feed.content)
        os.close(writing)
        yield feed.name, reading
    for network in plan.networks:
        if network.name in had:
            continue
        yield from _open_network(network, stack, weaker, groups)


def _open_network(
    network: Network, stack: contextlib.ExitStack, weaker: list[str], groups: tuple[str, ...]
) -> Iterator[tuple[str, int]]:
    """What a NIC's frames go through, under the network's name, and what else QEMU has to hold for it."""
    match network:
        case UserNetwork():
            link = user_network.open_link(network, groups=groups)
            stack.callback(link.close)
            weaker += [link.weaker] if link.weaker else []
            yield network.name, link.frames.fileno()
            yield network.lifeline, link.lifeline


def _fill(word: str, descriptors: dict[str, int]) -> str:
    if "@fd:" not in word:
        return word
    for name, number in descriptors.items():
        word = word.replace(f"@fd:{name}@", str(number))
    return word
