"""Atoll: run many operating systems side by side.

    import atoll

    with atoll.connect() as host:
        web = host.run("tiny", name="web")
        print(web.exec(["uname", "-a"]).text)

Everything is imported when it is first used, so `import atoll` costs next to nothing.
"""

from importlib import import_module

from atoll import errors
from atoll.errors import AtollError

TYPE_CHECKING = False  # type checkers know it by its name; importing `typing` takes longer than all the rest
if TYPE_CHECKING:
    from pathlib import Path

    from atoll.layout import Layout
    from atoll.model.backup import Backup, Keep
    from atoll.model.finding import Finding
    from atoll.model.image import Image
    from atoll.model.operation import Operation, Progress
    from atoll.model.requests import BuildRequest, CreateRequest, DiskRequest, ImportRequest, PullRequest, SetRequest
    from atoll.model.spec import DiskSpec, PortSpec, VmSpec
    from atoll.model.state import Phase
    from atoll.model.vm import Change, Event, ExecRequest, ExecResult, Stats, VmInfo
    from atoll.platform.api import AsyncHost, AsyncVm
    from atoll.platform.blocking import Host, Vm

__version__ = "0.1.0"

_HOMES = {
    "atoll.layout": ("Layout",),
    "atoll.model.finding": ("Finding",),
    "atoll.model.backup": ("Backup", "Keep"),
    "atoll.model.image": ("Image",),
    "atoll.model.operation": ("Operation", "Progress"),
    "atoll.model.requests": (
        "BuildRequest",
        "CreateRequest",
        "DiskRequest",
        "ImportRequest",
        "PullRequest",
        "SetRequest",
    ),
    "atoll.model.spec": ("DiskSpec", "PortSpec", "VmSpec"),
    "atoll.model.state": ("Phase",),
    "atoll.model.vm": ("Change", "Event", "ExecRequest", "ExecResult", "Stats", "VmInfo"),
    "atoll.platform.api": ("AsyncHost", "AsyncVm"),
    "atoll.platform.blocking": ("Host", "Vm"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def connect(
    where: "str | Layout | None" = None, *, token: "str | None" = None, ca: "str | Path | None" = None
) -> "Host":
    """A computer that runs VMs, to be used in a `with` block: this one, or where an agent serves: the name of one that
    was noted (`atoll host add`), or `https://…` with a token and the certificate of its authority (PEM or a file).

    On this one it goes through the agent if `atoll serve` runs, else it works in this process; a `Layout` says where
    this one's things are kept, and is always used in this process. Opening it in this process settles what killed
    commands have left. Raises `RecordsFailed` when the records can't be opened, `NetworkFailed`.
    """
    from atoll.platform.blocking import Host
    from atoll.platform.places import open_host

    return Host(open_host(where, token=token, ca=ca))


def connect_async(
    where: "str | Layout | None" = None, *, token: "str | None" = None, ca: "str | Path | None" = None
) -> "AsyncHost":
    """As `connect`, for an `async with` block: the same names, awaited."""
    from atoll.platform.places import open_host

    return open_host(where, token=token, ca=ca)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'atoll' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "AsyncHost",
    "AsyncVm",
    "AtollError",
    "Backup",
    "BuildRequest",
    "Change",
    "CreateRequest",
    "DiskRequest",
    "DiskSpec",
    "Event",
    "ExecRequest",
    "ExecResult",
    "Finding",
    "Host",
    "Image",
    "ImportRequest",
    "Keep",
    "Layout",
    "Operation",
    "Phase",
    "PortSpec",
    "Progress",
    "PullRequest",
    "SetRequest",
    "Stats",
    "Vm",
    "VmInfo",
    "VmSpec",
    "__version__",
    "connect",
    "connect_async",
    "errors",
]
