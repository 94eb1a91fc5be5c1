"""Which frames of a guest its user-mode network gets to see: a filter of the kernel's, on the helper's end of the link.

Slirp connects to whatever IPv4 or IPv6 address a frame names, and the host's own loopback is such an address: a guest
that puts 127.0.0.1 into a frame reaches the services that listen there for this computer only. Slirp's own switch
(`--disable-host-loopback`) closes just the two addresses that stand for the host. So frames are dropped before it reads
them. The addresses stand at fixed places: options and further headers come behind them.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from atoll.errors import EngineFailed

# Classic BPF (linux/bpf_common.h): load a word, a half or a byte at a fixed place; jump if equal; return.
_WORD, _HALF, _BYTE, _EQUAL, _RETURN = 0x20, 0x28, 0x30, 0x15, 0x06
_ATTACH, _LOCK = 26, 44
"""SO_ATTACH_FILTER and SO_LOCK_FILTER (asm-generic/socket.h); Python has no names for them."""
_GET_DESCRIPTOR = 438
"""pidfd_getfd(2), the same number on every architecture."""
_LONGEST_WAIT = 20_000
"""Microseconds that the helper waits for a guest that takes no frames, a paused one say, before it drops a frame."""

Step = tuple[str, int, str, str, int]
"""A label, an operation, where to go on if it holds and if not, and its number. `""` is the next step."""

_STEPS: Sequence[Step] = (
    ("", _HALF, "", "", 12),
    ("", _EQUAL, "pass", "", 0x0806),
    ("", _EQUAL, "ipv4", "", 0x0800),
    # Of anything else (frames in VLANs, NC-SI) slirp should see nothing.
    ("", _EQUAL, "ipv6", "drop", 0x86DD),
    ("ipv4", _BYTE, "", "", 30),
    ("", _EQUAL, "drop", "", 127),
    ("", _EQUAL, "drop", "", 0),
    ("", _WORD, "", "", 30),
    ("", _EQUAL, "", "pass", 0xFFFFFFFF),
    # To all: by UDP alone, which is how the guest asks for an address.
    ("", _BYTE, "", "", 23),
    ("", _EQUAL, "pass", "drop", 17),
    # In ::/64 are the unspecified address, loopback, and IPv4 addresses written as IPv6 ones (::ffff:127.0.0.1).
    ("ipv6", _WORD, "", "", 38),
    ("", _EQUAL, "", "pass", 0),
    ("", _WORD, "", "", 42),
    ("", _EQUAL, "drop", "pass", 0),
    ("pass", _RETURN, "", "", 0xFFFFFFFF),
    ("drop", _RETURN, "", "", 0),
)


def program() -> bytes:
    """The filter as the kernel takes it. A load from behind a frame's end drops the frame."""
    places = {label: index for index, (label, *_) in enumerate(_STEPS) if label}

    def distance(index: int, label: str) -> int:
        return places[label] - index - 1 if label else 0

    return b"".join(
        struct.pack("HBBI", operation, distance(index, then), distance(index, otherwise), number)
        for index, (_, operation, then, otherwise, number) in enumerate(_STEPS)
    )


def attach(receiver: socket.socket) -> None:
    """Let `receiver` get only the frames that may pass, and keep that so for ever. Raises `OSError`."""
    import ctypes

    code = program()
    buffer = ctypes.create_string_buffer(code, len(code))
    receiver.setsockopt(socket.SOL_SOCKET, _ATTACH, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
    receiver.setsockopt(socket.SOL_SOCKET, _LOCK, 1)


def guard(pid: int) -> None:
    """Put the filter on the end of our link that the process `pid` holds. Raises `EngineFailed` when it can't be."""
    try:
        ends = list(_ends_of_links(pid))
        try:
            if len(ends) != 1:
                raise EngineFailed("the network can't be made safe", f"its helper has {len(ends)} links to us")
            attach(ends[0])
            # Its writes wait for us when we are slow; yet it must go on hearing us while a guest stands still.
            ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, _LONGEST_WAIT))
        finally:
            for end in ends:
                end.close()
    except OSError as error:
        raise EngineFailed(
            "the network can't be made safe",
            f"this kernel doesn't let us filter what its helper reads: {error.strerror}",
            "Use `--network none`, and see `atoll doctor`.",
        ) from error


def _ends_of_links(pid: int) -> Iterator[socket.socket]:
    """Our copies of the sockets of that process whose peers are sockets of ours that carry messages."""
    process = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if not str(entry.readlink()).startswith("socket:"):
                    continue
            except FileNotFoundError:
                # The pipe by which it has just said that it is ready.
                continue
            copy = socket.socket(fileno=_copied(process, int(entry.name)))
            if copy.type == socket.SOCK_SEQPACKET and _peer(copy) == os.getpid():
                yield copy
            else:
                copy.close()
    finally:
        os.close(process)


def _peer(link: socket.socket) -> int:
    """The process that made the other end; 0 for a socket that isn't connected."""
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0])


def _copied(process: int, number: int) -> int:
    """A descriptor of another process, copied into ours. Raises `OSError`."""
    import ctypes

    copy = int(ctypes.CDLL(None, use_errno=True).syscall(_GET_DESCRIPTOR, process, number, 0))
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    os.set_inheritable(copy, False)
    return copy
