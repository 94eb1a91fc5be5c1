"""An example for each JSON object that the API takes, and for the answers that all calls share.

They are made of the real types, so an example that isn't valid any more can't be made.
"""

from typing import Any

import msgspec
from msgspec import Struct

from atoll.agent.problems import problem_of
from atoll.errors import NotFound
from atoll.model.backup import Keep
from atoll.model.operation import Progress
from atoll.model.requests import (
    BuildRequest,
    CreateRequest,
    DiskRequest,
    ImpairRequest,
    NetworkRequest,
    NicRequest,
    NicSetRequest,
    PullRequest,
    SetRequest,
    ShareRequest,
)
from atoll.model.spec import PortSpec
from atoll.model.task import Problem, Task
from atoll.model.vm import ExecRequest
from atoll.platform import routes
from atoll.platform.routes import Call, VmExec

_FOLDER = "/srv/backups"

BODIES: dict[str, Struct | dict[str, Any]] = {
    "host.create": CreateRequest(
        image="debian:12",
        name="web",
        cpus=2,
        memory="1GiB",
        ports=(PortSpec(host_port=8080, guest_port=80),),
        labels={"tier": "front"},
    ),
    "host.clone": {"source": "web@clean", "name": "web-2"},
    "host.fork": {"source": "web@clean", "count": 3, "name": "try-{n}"},
    "host.diff": {"old": "web@clean", "new": "web"},
    "host.prune": {"dry_run": True},
    "host.stop_all": {"timeout": 90.0, "suspend": True},
    "host.fsck": {"quick": True},
    "vm.set": SetRequest(cpus=4, labels={"tier": "back"}),
    "vm.start": {"wait": True, "timeout": 60.0},
    "vm.stop": {"timeout": 30.0},
    "vm.restart": {"timeout": 30.0},
    "vm.rename": {"name": "www"},
    "vm.wait": {"condition": "ready", "timeout": 60.0},
    "vm.exec": VmExec(command=ExecRequest(argv=("uname", "-a"), timeout=10.0)),
    "vm.type": {"text": "root\n"},
    "vm.key": {"keys": ("ctrl-alt-delete",)},
    "vm.publish": PortSpec(host_port=8443, guest_port=443),
    "vm.disk_add": DiskRequest(size="10GiB"),
    "vm.disk_resize": {"size": "20GiB"},
    "vm.share_add": ShareRequest(host_path="/srv/data", guest_path="/data", read_only=True),
    "vm.net_attach": NicRequest(network="lab", groups=("web",)),
    "vm.net_set": NicSetRequest(network="lab", limit=1_000_000),
    "vm.net_impair": ImpairRequest(network="lab", loss=1.0, delay=0.05),
    "vm.snapshot": {"name": "clean", "message": "before the upgrade"},
    "vm.restore": {"keep": True},
    "vm.fork": {"count": 2, "name": "try-{n}"},
    "vm.clone": {"name": "web-2"},
    "vm.backup": {"to": _FOLDER, "message": "nightly"},
    "images.create": {"source": "web@clean", "name": "web:1"},
    "images.build": BuildRequest(recipe="tiny"),
    "images.pull": PullRequest(source="debian:12"),
    "images.tag": {"reference": "web:1", "name": "web:latest"},
    "images.prune": {"dry_run": True},
    "pools.fill": {"snapshot": "web@clean", "ready": 2},
    "pools.take": {"snapshot": "web@clean", "name": "job-1"},
    "networks.create": NetworkRequest(name="lab", mode="nat"),
    "networks.exec": {"command": ("ping", "-c1", "web")},
    "groups.create": {"name": "web", "rules": ("allow in tcp 80,443 from any",)},
    "groups.set": {"rules": ("allow in tcp 443 from any",)},
    "backups.verify": {"folder": _FOLDER},
    "backups.prune": {"folder": _FOLDER, "vm": "web", "keep": Keep(daily=7, weekly=4), "dry_run": True},
    "backups.restore": {"folder": _FOLDER, "backup": "web", "name": "web-again"},
}

TASK = Task(
    id="3f9d2c1ab4e84f6d9a7c5e2b1d0f8a6c",
    call="images.pull",
    subject="debian:12",
    state="running",
    created_at=1764000000.0,
    progress=Progress(step="download", done=41943040, total=325058560, unit="bytes"),
)
PROBLEM = problem_of(NotFound("there is no VM 'web'", "none has that name or id", "`atoll ls` lists them."))
ANSWERS: dict[type[Struct], Struct] = {Task: TASK, Problem: PROBLEM}


def body_of(call: Call) -> Any:
    """The example for what a call takes, as JSON. None for a call that nobody wrote one for."""
    given = BODIES.get(call.name)
    kind = routes.body(call)
    if given is None or kind is None:
        return None
    whole = given if isinstance(given, Struct) else kind(**given)
    return {name: value for name, value in msgspec.to_builtins(whole).items() if value != _default(kind, name)}


def _default(kind: type[Struct], name: str) -> Any:
    field = next(each for each in msgspec.structs.fields(kind) if each.name == name)
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.to_builtins(field.default_factory())
    return msgspec.NODEFAULT if field.required else msgspec.to_builtins(field.default)
