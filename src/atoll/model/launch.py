"""What starting a VM takes, as data: an argv and what it needs by file descriptor.

`qemu/plan.py` makes it, `host/launch.py` does it.

In the argv `@fd:NAME@` stands for the number of the descriptor called NAME.
"""

from typing import Literal

from msgspec import Struct

from atoll.model.spec import PortSpec

Access = Literal["read", "read-write", "append"]


class OpenFile(Struct, frozen=True, kw_only=True):
    """A file to open. `append` makes it if it isn't there."""

    name: str
    path: str
    access: Access
    by_path: bool = False
    """QEMU opens it again as /proc/self/fd/N."""


class Listener(Struct, frozen=True, kw_only=True):
    """A listening Unix socket to bind at `path`."""

    name: str
    path: str


class Feed(Struct, frozen=True, kw_only=True):
    """A pipe whose reading end is handed over with `content` already in it."""

    name: str
    content: bytes


class UserNetwork(Struct, frozen=True, kw_only=True):
    """A user-mode network for one NIC: a helper process, and a link to it that carries a frame in each message.

    QEMU gets the link's end as the descriptor called `name`, and what keeps the helper alive as `lifeline`, which is in
    no argv.
    """

    name: str
    link: str
    """The path at which the helper waits for us; gone once the link stands."""
    control: str
    """The path of the socket at which ports are published and taken back."""
    ports: tuple[PortSpec, ...] = ()
    restrict: bool = False

    @property
    def lifeline(self) -> str:
        return f"{self.name}-lifeline"


Network = UserNetwork
"""Where the descriptor of a NIC comes from: one type for each kind of network."""


class LaunchPlan(Struct, frozen=True, kw_only=True):
    binary: str
    argv: tuple[str, ...]
    files: tuple[OpenFile, ...] = ()
    listeners: tuple[Listener, ...] = ()
    feeds: tuple[Feed, ...] = ()
    networks: tuple[Network, ...] = ()
    working_folder: str = "/"
    memory: int = 0
    """Bytes that it may take, guest and all."""


class Firmware(Struct, frozen=True, kw_only=True):
    """A UEFI firmware found by its descriptor: the code, and the variables a new VM starts with."""

    code: str
    variables: str
    variables_format: Literal["raw", "qcow2"] = "raw"
    code_format: Literal["raw", "qcow2"] = "raw"
    description: str = ""


class Capabilities(Struct, frozen=True, kw_only=True):
    """What one QEMU binary said that it can do."""

    binary: str
    identity: str
    """Path, size and modification time: another binary is another set of capabilities."""
    version: tuple[int, int, int]
    package: str
    arch: str
    machines: dict[str, str]
    """Every machine type and alias with the versioned type it stands for: `q35` → `pc-q35-10.0`."""
    types: frozenset[str]
    """All QOM types: devices, objects, back ends."""
    commands: frozenset[str]
    cpus: frozenset[str]
    options: frozenset[str]
    """The command line's options, without the dash."""

    def has(
        self,
        *,
        type: str | None = None,
        command: str | None = None,
        machine: str | None = None,
        cpu: str | None = None,
        option: str | None = None,
    ) -> bool:
        """Whether all the things that are asked for are there."""
        return (
            (type is None or type in self.types)
            and (command is None or command in self.commands)
            and (machine is None or machine in self.machines)
            and (cpu is None or cpu in self.cpus)
            and (option is None or option in self.options)
        )

    @property
    def version_text(self) -> str:
        return ".".join(str(number) for number in self.version)
