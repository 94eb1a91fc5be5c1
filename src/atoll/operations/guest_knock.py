"""Wakes a guest's agent early, while this process still imports what it needs to speak to it.

An agent without a host looks for one only ten times a second (see `guest_agent.py`). A connection that says nothing is
enough for it to notice, and it is given up before the real one is made.
"""

import contextlib
import socket

from atoll.errors import AtollError
from atoll.host.sockets import answers, connect
from atoll.operations.services import Services

_knocking: list[socket.socket] = []


def knock(reference: str) -> None:
    """Connect to the agent of a VM that seems to run. Whatever is wrong is told later, by who really needs it."""
    services = Services()
    try:
        # Then it isn't us who will speak to the guest, and our connection would keep that one out.
        if answers(services.layout.agent_socket):
            return
        with contextlib.suppress(AtollError, OSError):
            vm = services.find_vm(reference)
            if vm.run is not None and vm.spec.guest.agent:
                _knocking.append(connect(services.layout.vm(vm.id).socket("agent")))
    finally:
        services.close()


def stop_knocking() -> None:
    """Before waiting for the agent's lock: whoever has it shall not wait for us."""
    while _knocking:
        _knocking.pop().close()
