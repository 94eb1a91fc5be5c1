"""A word to systemd about ourselves: sd_notify(3), which is one datagram."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Say `READY=1` or `STOPPING=1`. Nothing happens where systemd hasn't started us to say so."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
        client.sendto(state.encode(), address)
