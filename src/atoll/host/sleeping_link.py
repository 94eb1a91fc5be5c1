"""The end of a card's network while its machine sleeps: whoever calls the machine makes it readable, nothing else does.

It is what QEMU gets later on: the link to a user-mode network's helper, or a tap. A filter of the kernel's drops what
isn't for the card; what is waits there, unread, until QEMU reads it.
"""

import contextlib
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path

from atoll.host import descriptors, frame_filter, slirp

_DETACH = 27
"""SO_DETACH_FILTER (asm-generic/socket.h)."""
_TAP_ATTACH, _TAP_DETACH = 0x401054D5, 0x401054D6
"""TUNATTACHFILTER, TUNDETACHFILTER (linux/if_tun.h)."""
_MOST, _FRAME = 1024, 1 << 17
"""Descriptors of a QEMU that are looked at; bytes of a frame."""
_TAP_HEADER = bytes(10)
"""Of virtio: nothing is left to do for this frame."""


def fall_asleep(descriptor: int, *, mac: str, address: str) -> None:
    """Let only what is for this card in, and tell the network where the card is."""
    code = frame_filter.assembled(frame_filter.calls(mac, address))
    _set(descriptor, code)
    drain(descriptor, mac=mac, address=address)
    announce(descriptor, mac=mac, address=address)


def inherited(engine: int, control: Path) -> tuple[int, int] | None:
    """Our copies of what QEMU holds of a user-mode network: its end of the link, and the helper's lifeline.

    None where the kernel doesn't let us have them, where there is no helper, and where there are several links: nothing
    tells which is whose.
    """
    helper = slirp.listener(control)
    if helper is None:
        return None
    links: list[int] = []
    lifelines: list[int] = []
    with contextlib.suppress(OSError), descriptors.handle(helper) as theirs, descriptors.handle(engine) as its:
        pipes = {
            os.fstat(copy).st_ino for copy in descriptors.copies(theirs, most=_MOST) if _is_pipe(copy, os.O_RDONLY)
        }
        for copy in descriptors.copies(its, most=_MOST):
            if frame_filter.carries_messages(copy):
                links.append(os.dup(copy))
            elif _is_pipe(copy, os.O_WRONLY) and os.fstat(copy).st_ino in pipes:
                lifelines.append(os.dup(copy))
    if len(links) == len(lifelines) == 1:
        return links[0], lifelines[0]
    for each in (*links, *lifelines):
        os.close(each)
    return None


def _is_pipe(descriptor: int, access: int) -> bool:
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    return stat.S_ISFIFO(os.fstat(descriptor).st_mode) and mode == access


def drain(descriptor: int, *, mac: str, address: str) -> None:
    """Drop what had come before the filter was there, and isn't for the card, up to the first frame that is.

    A tap's frames can't be looked at without being taken: who sent that one sends it again.
    """
    if not _is_socket(descriptor):
        with contextlib.suppress(BlockingIOError):
            while not frame_filter.is_call(os.read(descriptor, _FRAME)[len(_TAP_HEADER) :], mac, address):
                pass
        return
    with socket.socket(fileno=os.dup(descriptor)) as end, contextlib.suppress(OSError):
        while frame := end.recv(_FRAME, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            if frame_filter.is_call(frame, mac, address):
                return
            end.recv(_FRAME, socket.MSG_DONTWAIT)


def wake_up(descriptor: int) -> None:
    """Let everything in again."""
    with contextlib.suppress(OSError):
        _set(descriptor, None)


def _set(descriptor: int, code: bytes | None) -> None:
    import ctypes

    buffer = ctypes.create_string_buffer(code or b"", max(1, len(code or b"")))
    program = struct.pack("HP", len(code or b"") // 8, ctypes.addressof(buffer))
    if not _is_socket(descriptor):
        fcntl.ioctl(descriptor, _TAP_ATTACH if code else _TAP_DETACH, program)
        return
    with socket.socket(fileno=os.dup(descriptor)) as end:
        end.setsockopt(socket.SOL_SOCKET, frame_filter.ATTACH if code else _DETACH, program)


def announce(descriptor: int, *, mac: str, address: str) -> None:
    """Say who has the address (RFC 5227, section 2.3), so that nobody has to ask first."""
    sender, owner = bytes.fromhex(mac.replace(":", "")), socket.inet_aton(address)
    packet = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + sender + owner + bytes(6) + owner
    frame = b"\xff" * 6 + sender + b"\x08\x06" + packet
    # A link that takes nothing now is one that has been told before.
    with contextlib.suppress(OSError):
        os.write(descriptor, frame if _is_socket(descriptor) else _TAP_HEADER + frame)


def _is_socket(descriptor: int) -> bool:
    return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
