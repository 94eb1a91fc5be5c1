"""A network on this computer: brought up when it isn't there, with the taps of its VMs, and taken down.

    user + network namespace     br0 ── tap of each VM       dnsmasq: names, addresses
    (held by a shell)             │
                                 up0 ── slirp4netns (mode nat), in this computer's network

Callers hold the network's lock. Whatever is killed on the way, `ensure` makes the rest and `end` takes all of it.
"""

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from atoll.errors import WrongState
from atoll.host import cables, files, group_text, link_text, namespace, network_text, uplink
from atoll.host.link_text import Link, Port
from atoll.layout import NetworkPaths
from atoll.model.network import Impairment, Members, Network
from atoll.model.subnets import address6

_LOOK = f"ip -j link show; echo; nft -t -j list table bridge {group_text.TABLE} 2>&- || :"


def is_up(paths: NetworkPaths) -> bool:
    return namespace.holder_of(paths) is not None


async def ensure(members: Members, paths: NetworkPaths) -> int:
    """Bring the network up where it isn't; returns its holder's pid. Raises `NetworkFailed`, `MissingTool`."""
    holder = namespace.holder_of(paths)
    if holder is None:
        _write_all(members, paths)
        holder = await namespace.hold(members.network, paths)
    else:
        await tell(members, paths)
    if members.network.mode == "nat":
        await uplink.ensure(paths, holder.pid, ipv6=members.network.subnet6 is not None)
    return holder.pid


def _write_all(members: Members, paths: NetworkPaths) -> None:
    network, attached = members.network, members.attached
    _make_folder_of_names(paths)
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
        paths.policy: "",
        paths.dhcp: network_text.dhcp(network, leases=str(paths.leases)),
    }
    for path, text in texts.items():
        path.write_text(text)
        path.chmod(0o644)


def _make_folder_of_names(paths: NetworkPaths) -> None:
    files.make_folder(paths.names)
    # dnsmasq is another user; the folder that this is in keeps the others out.
    paths.names.chmod(0o755)


async def tell(members: Members, paths: NetworkPaths) -> None:
    """Let a network that is up know which VMs there are, under which names, and what their rules are.

    Raises `ProcessFailed`; the rules before hold then.
    """
    holder = namespace.holder_of(paths)
    if holder is None:
        return
    policy = _policy(members)
    if policy != _told_policy(paths):
        # Until it is known what holds: a full disk, or a kill, may keep the note from being written.
        paths.policy.unlink(missing_ok=True)
        await _guard(holder.pid, paths, members)
        files.write_atomically(paths.policy, policy)
    network, attached = members.network, members.attached
    texts = {paths.hosts: network_text.hosts(network, attached), paths.leases: network_text.leases(attached)}
    if all(path.exists() and path.read_text() == text for path, text in texts.items()):
        return
    # An older build's network has none.
    _make_folder_of_names(paths)
    for path, text in texts.items():
        files.write_atomically(path, text.encode(), mode=0o644)
    namespace.read_again(network.id, paths, holder.pid)


def write_resolver(network: Network, paths: NetworkPaths) -> None:
    """For programs of this computer that run in it: whom they ask for names."""
    files.write_atomically(paths.resolver, network_text.resolver(network).encode())
    with contextlib.suppress(FileNotFoundError):
        here = Path("/etc/nsswitch.conf").read_text()
        files.write_atomically(paths.name_switch, network_text.name_switch(here).encode())


def _policy(members: Members) -> bytes:
    """All that decides which rules hold; nothing when there are none."""
    ruled = any(each.groups or each.limit for each in members.attached)
    return msgspec.json.encode((members.attached, members.groups)) if ruled else b""


def _told_policy(paths: NetworkPaths) -> bytes | None:
    """What the rules that hold were made from; None when that isn't known."""
    try:
        return paths.policy.read_bytes()
    except FileNotFoundError:
        return None


async def add_tap(holder: int, paths: NetworkPaths, members: Members, *, mac: str, address: str) -> int:
    """A tap on the bridge, guarded, as an open descriptor: it goes with that. Raises `NetworkFailed`, `ProcessFailed`.

    Its name is never given again, so that guards of a tap that is gone let nobody in.
    """
    subnet6 = members.network.subnet6
    own6 = address6(subnet6, mac) if subnet6 else ""
    port = Port(tap=f"{link_text.TAP}{secrets.token_hex(6)}", mac=mac, address=address, address6=own6)

    def make() -> list[int]:
        namespace.announce(link_text.BRIDGE, mac, address)
        return [namespace.make_tap(port.tap)]

    (descriptor,) = namespace.open_inside(holder, make, "a network tap")
    try:
        await _guard(holder, paths, members, joining=link_text.joined(port))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


async def _guard(holder: int, paths: NetworkPaths, members: Members, joining: str = "") -> None:
    """Cables as they should be, and all filters made anew from what is there then, in one transaction."""
    links, there = await look(holder, joining)
    wanted = impairments(paths)
    links = await cables.mended(holder, paths, links, wanted)
    limits = {each.mac: each.limit for each in members.attached}
    ports, relayed = link_text.ports_of(links), link_text.relayed_of(links)
    text = network_text.guards(ports, wanted, limits, relayed=relayed) + group_text.groups(members, ports, there)
    await namespace.run(holder, "nft", "-f", "-", stdin=text)


async def look(holder: int, joining: str = "") -> tuple[Sequence[Link], bytes]:
    """What there is: links, and what nft tells of the table of groups."""
    told = await namespace.run(holder, "sh", "-c", f"ip -batch - && {_LOOK}", stdin=joining)
    shown, _, there = told.stdout.partition(b"\n\n")
    return link_text.links_of(shown), there


def impairments(paths: NetworkPaths) -> list[Impairment]:
    try:
        return msgspec.json.decode(paths.impairments.read_bytes(), type=list[Impairment])
    except FileNotFoundError:
        return []


async def impair(members: Members, paths: NetworkPaths, wanted: Impairment) -> None:
    """From now on the card's cable does this wrong, and nothing else. Raises `WrongState` when it is down."""
    holder = namespace.holder_of(paths)
    if holder is None:
        raise WrongState("the network is down", "no VM on it has started", "Start one.")
    others = [each for each in impairments(paths) if each.mac != wanted.mac]
    # A cut is one thing for both of its ends.
    others = [replace(each, cut_from=tuple(mac for mac in each.cut_from if mac != wanted.mac)) for each in others]
    before = impairments(paths)
    try:
        await _impair(holder.pid, paths, members, [*others, wanted])
    except BaseException:
        await _impair(holder.pid, paths, members, before)
        raise


async def _impair(holder: int, paths: NetworkPaths, members: Members, everything: Sequence[Impairment]) -> None:
    everything = [each for each in everything if each != Impairment(mac=each.mac)]
    files.write_atomically(paths.impairments, msgspec.json.encode(everything))
    await _guard(holder, paths, members)


async def counters(paths: NetworkPaths) -> dict[str, link_text.Counted]:
    """What has passed through each card that has a cable here, by its hardware address; nothing when it is down."""
    holder = namespace.holder_of(paths)
    if holder is None:
        return {}
    shown = await namespace.run(holder.pid, "ip", "-j", "-s", "link", "show", "type", "tun")
    return link_text.counters_of(shown.stdout)


def end(network_id: str, paths: NetworkPaths) -> None:
    """Take it all away; idempotent."""
    import shutil

    cables.end(paths)
    uplink.end(paths)
    namespace.end(network_id, paths)
    shutil.rmtree(paths.run, ignore_errors=True)
