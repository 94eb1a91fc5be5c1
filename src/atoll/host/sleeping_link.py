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

from atoll.host import frame_filter

_ATTACH, _DETACH = 26, 27
"""SO_ATTACH_FILTER, SO_DETACH_FILTER (asm-generic/socket.h)."""
_TAP_ATTACH, _TAP_DETACH = 0x401054D5, 0x401054D6
"""TUNATTACHFILTER, TUNDETACHFILTER (linux/if_tun.h)."""
_TAP_HEADER = bytes(10)
"""Of virtio: nothing is left to do for this frame."""


def fall_asleep(descriptor: int, *, mac: str, address: str) -> None:
    """Let only what is for this card in, and tell the network where the card is."""
    code = frame_filter.assembled(frame_filter.calls(mac, address))
    _set(descriptor, code)
    announce(descriptor, mac=mac, address=address)


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
        end.setsockopt(socket.SOL_SOCKET, _ATTACH if code else _DETACH, program)


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
