"""Whether a port of this computer can be published."""

from atoll.errors import AlreadyExists, InvalidInput
from atoll.model.spec import PortSpec


def check_port_free(name: str, port: PortSpec) -> None:
    """Tell who is in the way before QEMU fails on it. Raises `AlreadyExists`, `InvalidInput`."""
    import socket

    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if port.protocol == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host_address, port.host_port))
        except PermissionError as error:
            raise InvalidInput(
                f"{name}: port {port.host_port} can't be published",
                "ports below 1024 are root's",
                "Choose a higher one with -p.",
            ) from error
        except OSError as error:
            raise AlreadyExists(
                f"{name}: port {port.host_port} on {port.host_address} can't be published",
                error.strerror or str(error),
                "Choose another with -p, or stop the program that has it.",
            ) from error
