"""What a guest must learn that went on from memory, or has another machine's disks: the time, and who it is.

A file beside its disks says what, and whoever speaks with its agent first tells it. So a hundred copies go on at once,
and whoever asks one for anything finds it settled. A restore doesn't wait for that first question: it asks itself.
"""

import contextlib
import time
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from atoll.errors import GuestFailed
from atoll.host import files
from atoll.layout import VmPaths

if TYPE_CHECKING:
    from atoll.qemu.guest import Agent

SH = "/bin/sh"
TIME_TO_SETTLE = 20.0
"""Seconds until a script has to have ended. Making keys isn't part of that: it goes on in the background."""

IDENTITY = r"""
name=$1
printf '%s\n' "$name" >/etc/hostname
hostname "$name" 2>/dev/null || printf %s "$name" >/proc/sys/kernel/hostname
if grep -q '^127\.0\.1\.1' /etc/hosts 2>/dev/null; then
    sed "s/^127\.0\.1\.1.*/127.0.1.1 $name/" /etc/hosts >/etc/hosts.new && cat /etc/hosts.new >/etc/hosts
    rm -f /etc/hosts.new
fi
if [ -s /etc/machine-id ]; then
    od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >/etc/machine-id.new
    echo >>/etc/machine-id.new
    chmod 444 /etc/machine-id.new
    mv /etc/machine-id.new /etc/machine-id
    if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
        cp /etc/machine-id /var/lib/dbus/machine-id
    fi
fi
for key in /etc/ssh/ssh_host_*_key; do
    [ -e "$key" ] || continue
    rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
    (
        ssh-keygen -A
        for service in ssh sshd; do systemctl try-restart $service || rc-service $service restart; done
    ) </dev/null >/dev/null 2>&1 &
    break
done
sync
"""
"""For Linux: a name, an id and host keys of its own, the two latter only where there are some."""


CARD = r"""
old=$1 mac=$2 address=$3 gateway=$4
for card in /sys/class/net/*; do
    [ "$(cat "$card/address")" = "$old" ] || continue
    name=${card##*/}
    ip link set "$name" down
    ip link set "$name" address "$mac"
    ip addr flush dev "$name"
    [ -n "$address" ] && ip addr add "$address" dev "$name"
    ip link set "$name" up
    [ -n "$gateway" ] && ip route replace default via "$gateway" dev "$name"
    # Whoever asks for addresses has the old one in mind.
    if [ -x /usr/lib/atoll/network ]; then
        /usr/lib/atoll/network "$name"
    elif networkctl status "$name" >/dev/null 2>&1; then
        networkctl reconfigure "$name"
    elif ifquery --state "$name" >/dev/null 2>&1; then
        (ifdown --force "$name"; ifup --force "$name") </dev/null >/dev/null 2>&1 &
    fi
done
"""
"""For Linux: another hardware address and another IPv4 address for the card that had the old one."""


class NewCard(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a card is to have from now on."""

    old: str
    """The hardware address that it has."""
    mac: str
    address: str
    """With its prefix: `10.213.0.2/24`; empty where it has to ask for one."""
    gateway: str = ""


class Unsettled(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be told."""

    time: bool = False
    name: str = ""
    """Its own name, for one that still thinks that it is another machine."""
    cards: tuple[NewCard, ...] = ()


def leave_word(paths: VmPaths, *, time: bool = False, name: str = "", cards: tuple[NewCard, ...] = ()) -> None:
    """Have the guest told at the next exchange; with what had been left before. Raises `StorageFailed`."""
    before = _read(paths) or Unsettled()
    wanted = replace(before, time=time or before.time, name=name or before.name, cards=cards or before.cards)
    files.write_atomically(paths.unsettled, msgspec.json.encode(wanted))


def rename_word(paths: VmPaths, name: str) -> None:
    """A machine that was to learn its name has another one meanwhile."""
    if (before := _read(paths)) is not None and before.name:
        files.write_atomically(paths.unsettled, msgspec.json.encode(replace(before, name=name)))


def _read(paths: VmPaths) -> Unsettled | None:
    try:
        return msgspec.json.decode(paths.unsettled.read_bytes(), type=Unsettled)
    except (OSError, msgspec.DecodeError):
        return None


async def settle(paths: VmPaths, agent: "Agent") -> None:
    """Tell the guest what was left for it. One that can't do it is left as it is. Raises `GuestFailed` when it ends."""
    from atoll.qemu.guest import Refused

    wanted = _read(paths)
    if wanted is None:
        return
    if wanted.time:
        try:
            await agent.set_time(time.time_ns())
        except Refused:
            # Up to QEMU 9 the agent does it only where there is /sbin/hwclock, which minimal systems lack.
            with contextlib.suppress(Refused):
                await _run(agent, 'date -u -s "@$1"', str(round(time.time())))
    for card in wanted.cards:
        with contextlib.suppress(Refused):
            await _run(agent, CARD, card.old, card.mac, card.address, card.gateway)
    if wanted.name:
        with contextlib.suppress(Refused):
            await _run(agent, IDENTITY, wanted.name)
    paths.unsettled.unlink(missing_ok=True)


async def _run(agent: "Agent", script: str, *arguments: str) -> None:
    """Run a script to its end. Raises `Refused`, `GuestFailed`."""
    import asyncio

    pid = await agent.start(SH, ["-c", script, "sh", *arguments], capture=True)
    pause, end = 0.005, time.monotonic() + TIME_TO_SETTLE
    # The agent has no event for the end of a program.
    while not (await agent.status(pid)).exited:
        if time.monotonic() > end:
            raise GuestFailed("the guest doesn't take its time or name", f"not in {TIME_TO_SETTLE:g} s")
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.2)
