"""A network on this computer: brought up when it isn't there, with the taps of its VMs, and taken down.

    user + network namespace     br0 ── tap of each VM       dnsmasq: names, addresses
    (held by a shell)             │
                                 up0 ── slirp4netns (mode nat), in this computer's network

Callers hold the network's lock. Whatever is killed on the way, `ensure` makes the rest and `end` takes all of it.
"""

import contextlib
import os
import secrets
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from atoll.errors import WrongState
from atoll.host import cables, files, namespace, network_text, uplink
from atoll.host.network_text import Link, Port
from atoll.layout import NetworkPaths
from atoll.model.network import Attached, Impairment, Network


def is_up(paths: NetworkPaths) -> bool:
    return namespace.holder_of(paths) is not None


async def ensure(network: Network, paths: NetworkPaths, attached: Sequence[Attached]) -> int:
    """Bring the network up where it isn't; returns its holder's pid. Raises `NetworkFailed`, `MissingTool`."""
    holder = namespace.holder_of(paths)
    if holder is None:
        _write_all(network, paths, attached)
        holder = await namespace.hold(network.id, paths)
    else:
        tell_names(network, paths, attached)
    if network.mode == "nat":
        await uplink.ensure(paths, holder.pid)
    return holder.pid


def _write_all(network: Network, paths: NetworkPaths, attached: Sequence[Attached]) -> None:
    files.make_folder(paths.run)
    paths.impairments.unlink(missing_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkfifo(paths.alive, 0o600)
    with contextlib.suppress(FileNotFoundError):
        paths.log.replace(paths.log.with_name("log.1"))
    dns = uplink.DNS if network.mode == "nat" else None
    texts = {
        paths.links: network_text.links(network),
        paths.rules: network_text.rules(network),
        paths.hosts: network_text.hosts(network, attached),
        paths.leases: network_text.leases(attached),
        paths.dns: network_text.dns(network, hosts=str(paths.hosts), upstream=dns),
        paths.dhcp: network_text.dhcp(network, leases=str(paths.leases)),
    }
    for path, text in texts.items():
        path.write_text(text)


def tell_names(network: Network, paths: NetworkPaths, attached: Sequence[Attached]) -> None:
    """Let a network that is up know which VMs there are, under which names."""
    texts = {paths.hosts: network_text.hosts(network, attached), paths.leases: network_text.leases(attached)}
    holder = namespace.holder_of(paths)
    if holder is None or all(path.exists() and path.read_text() == text for path, text in texts.items()):
        return
    for path, text in texts.items():
        files.write_atomically(path, text.encode())
    with contextlib.suppress(ProcessLookupError):
        os.killpg(holder.pid, signal.SIGHUP)


def write_resolver(network: Network, paths: NetworkPaths) -> None:
    """For programs of this computer that run in it: whom they ask for names."""
    files.write_atomically(paths.resolver, network_text.resolver(network).encode())
    with contextlib.suppress(FileNotFoundError):
        here = Path("/etc/nsswitch.conf").read_text()
        files.write_atomically(paths.name_switch, network_text.name_switch(here).encode())


async def add_tap(holder: int, paths: NetworkPaths, mac: str, address: str) -> int:
    """A tap on the bridge, guarded, as an open descriptor: it goes with that. Raises `NetworkFailed`, `ProcessFailed`.

    Its name is never given again, so that guards of a tap that is gone let nobody in.
    """
    port = Port(tap=f"{network_text.TAP}{secrets.token_hex(6)}", mac=mac, address=address)
    descriptor = namespace.open_tap(holder, port.tap)
    try:
        script = "ip -batch - && ip -j link show"
        shown = await namespace.run(holder, "sh", "-c", script, stdin=network_text.joined(port))
        await _wire(holder, paths, network_text.links_of(shown.stdout))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


async def _wire(holder: int, paths: NetworkPaths, links: Sequence[Link]) -> None:
    """Cables as they should be, and guards for what is there then."""
    wanted = impairments(paths)
    links = await cables.mended(holder, paths, links, wanted)
    ports, relayed = network_text.ports_of(links), network_text.relayed_of(links)
    await namespace.run(holder, "nft", "-f", "-", stdin=network_text.guards(ports, wanted, relayed=relayed))


def impairments(paths: NetworkPaths) -> list[Impairment]:
    try:
        return msgspec.json.decode(paths.impairments.read_bytes(), type=list[Impairment])
    except FileNotFoundError:
        return []


async def impair(paths: NetworkPaths, wanted: Impairment) -> None:
    """From now on the card's cable does this wrong, and nothing else. Raises `WrongState` when it is down."""
    holder = namespace.holder_of(paths)
    if holder is None:
        raise WrongState("the network is down", "no VM on it has started", "Start one.")
    others = [each for each in impairments(paths) if each.mac != wanted.mac]
    # A cut is one thing for both of its ends.
    others = [replace(each, cut_from=tuple(mac for mac in each.cut_from if mac != wanted.mac)) for each in others]
    before = impairments(paths)
    try:
        await _impair(holder.pid, paths, [*others, wanted])
    except BaseException:
        await _impair(holder.pid, paths, before)
        raise


async def _impair(holder: int, paths: NetworkPaths, everything: Sequence[Impairment]) -> None:
    everything = [each for each in everything if each != Impairment(mac=each.mac)]
    files.write_atomically(paths.impairments, msgspec.json.encode(everything))
    shown = await namespace.run(holder, "ip", "-j", "link", "show")
    await _wire(holder, paths, network_text.links_of(shown.stdout))


async def counters(paths: NetworkPaths) -> dict[str, network_text.Counted]:
    """What has passed through each card that has a cable here, by its hardware address; nothing when it is down."""
    holder = namespace.holder_of(paths)
    if holder is None:
        return {}
    shown = await namespace.run(holder.pid, "ip", "-j", "-s", "link", "show", "type", "tun")
    return network_text.counters_of(shown.stdout)


def end(network_id: str, paths: NetworkPaths) -> None:
    """Take it all away; idempotent."""
    import shutil

    cables.end(paths)
    namespace.end(network_id, paths)
    shutil.rmtree(paths.run, ignore_errors=True)
