"""The HTTP API as a table: which method of the façade stands behind which verb and path.

The agent makes its handlers and its OpenAPI document of it, `platform/remote.py` its requests. So a call has the same
name, options and result in the SDK, over the local socket and over HTTPS.

    {vm} in a path       is the VM that the method is called on
    {other} in a path    is the argument of that name
    GET and DELETE       have the other arguments in the query, each other verb in a JSON object
    one Struct           as the only argument is the JSON object itself
    a VM as the result   is its `VmInfo`
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from atoll.model.requests import CreateRequest
from atoll.model.token import Scope
from atoll.model.vm import ExecRequest, ExecResult, VmInfo
from atoll.platform import api
from atoll.platform.copies import AsyncCopies

Http = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
VERSION = "/v1"


class Call(Struct, frozen=True, eq=False):
    """One method of the façade over HTTP."""

    http: Http
    path: str
    """Below `VERSION`."""
    method: Callable[..., Any]
    scope: Scope
    """What a token must be good for. `admin` is for what names files of the host's, or runs its programs."""

    @property
    def name(self) -> str:
        """`vm.start`, `host.fork`, `images.pull` …"""
        return f"{self.target.removeprefix('Async').lower()}.{self.method.__name__}"

    @property
    def target(self) -> str:
        """The class of the façade that has the method."""
        return self.method.__qualname__.partition(".")[0]

    @property
    def changes(self) -> bool:
        return self.http != "GET"


class VmExec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command for the guest, with all of its input at once; the WebSocket beside it streams."""

    command: ExecRequest
    stdin: bytes | None = None


async def _exec(self: "api.AsyncVm", request: VmExec) -> ExecResult:
    """Run a command in the guest, and wait for it. Its output comes whole, in Base64."""
    return await self.exec(request.command, stdin=request.stdin)


_exec.__name__, _exec.__qualname__ = "exec", "AsyncVm.exec"


async def _create(self: "api.AsyncHost", request: CreateRequest, report: api.Report | None = None) -> "api.AsyncVm":
    """A new VM, stopped. Its image is pulled or built when it isn't here."""
    return await self.create(request, report=report)


_create.__name__, _create.__qualname__ = "create", "AsyncHost.create"

_host, _vm = api.AsyncHost, api.AsyncVm
_images, _operations, _pools = api.AsyncImages, api.AsyncOperations, api.AsyncPools
_networks, _groups, _backups = api.AsyncNetworks, api.AsyncGroups, api.AsyncBackups

CALLS = (
    Call("GET", "/vms", _host.ls, "read"),
    Call("GET", "/memory", _host.memory, "read"),
    Call("POST", "/vms", _create, "operate"),
    Call("POST", "/clone", _host.clone, "operate"),
    Call("POST", "/fork", _host.fork, "operate"),
    Call("POST", "/diff", _host.diff, "read"),
    Call("POST", "/stop", _host.stop_all, "operate"),
    Call("POST", "/prune", _host.prune, "admin"),
    Call("POST", "/fsck", _host.fsck, "admin"),
    Call("GET", "/vms/{vm}", _vm.info, "read"),
    Call("PATCH", "/vms/{vm}", _vm.set, "operate"),
    Call("DELETE", "/vms/{vm}", _vm.rm, "operate"),
    Call("POST", "/vms/{vm}/start", _vm.start, "operate"),
    Call("POST", "/vms/{vm}/stop", _vm.stop, "operate"),
    Call("POST", "/vms/{vm}/restart", _vm.restart, "operate"),
    Call("POST", "/vms/{vm}/pause", _vm.pause, "operate"),
    Call("POST", "/vms/{vm}/resume", _vm.resume, "operate"),
    Call("POST", "/vms/{vm}/suspend", _vm.suspend, "operate"),
    Call("POST", "/vms/{vm}/rename", _vm.rename, "operate"),
    Call("POST", "/vms/{vm}/wait", _vm.wait, "read"),
    Call("POST", "/vms/{vm}/exec", _exec, "operate"),
    Call("POST", "/vms/{vm}/type", _vm.type, "operate"),
    Call("POST", "/vms/{vm}/key", _vm.key, "operate"),
    Call("GET", "/vms/{vm}/stats", _vm.stats, "read"),
    Call("GET", "/vms/{vm}/ports", _vm.ports, "read"),
    Call("POST", "/vms/{vm}/ports", _vm.publish, "operate"),
    Call("DELETE", "/vms/{vm}/ports/{host_port}", _vm.unpublish, "operate"),
    Call("GET", "/vms/{vm}/disks", _vm.disks, "read"),
    Call("POST", "/vms/{vm}/disks", _vm.disk_add, "operate"),
    Call("DELETE", "/vms/{vm}/disks/{name}", _vm.disk_rm, "operate"),
    Call("POST", "/vms/{vm}/disks/{name}/resize", _vm.disk_resize, "operate"),
    Call("GET", "/vms/{vm}/shares", _vm.shares, "read"),
    Call("POST", "/vms/{vm}/shares", _vm.share_add, "admin"),
    Call("DELETE", "/vms/{vm}/shares", _vm.share_rm, "operate"),
    Call("POST", "/vms/{vm}/nics", _vm.net_attach, "operate"),
    Call("PATCH", "/vms/{vm}/nics", _vm.net_set, "operate"),
    Call("DELETE", "/vms/{vm}/nics/{network}", _vm.net_detach, "operate"),
    Call("POST", "/vms/{vm}/impair", _vm.net_impair, "operate"),
    Call("GET", "/vms/{vm}/snapshots", _vm.history, "read"),
    Call("POST", "/vms/{vm}/snapshots", _vm.snapshot, "operate"),
    Call("POST", "/vms/{vm}/snapshots/{snapshot}/restore", _vm.restore, "operate"),
    Call("POST", "/vms/{vm}/snapshots/{snapshot}/diff", _vm.diff, "read"),
    Call("DELETE", "/vms/{vm}/snapshots/{snapshot}", _vm.forget, "operate"),
    Call("POST", "/vms/{vm}/fork", _vm.fork, "operate"),
    Call("POST", "/vms/{vm}/clone", _vm.clone, "operate"),
    Call("POST", "/vms/{vm}/backup", _vm.backup, "admin"),
    Call("GET", "/images", _images.ls, "read"),
    Call("GET", "/image", _images.show, "read"),
    Call("POST", "/images", _images.create, "operate"),
    Call("DELETE", "/images", _images.rm, "operate"),
    Call("GET", "/catalogue", _images.catalogue, "read"),
    Call("POST", "/images/build", _images.build, "operate"),
    Call("POST", "/images/pull", _images.pull, "operate"),
    Call("POST", "/images/tag", _images.tag, "operate"),
    Call("POST", "/images/prune", _images.prune, "admin"),
    Call("GET", "/operations", _operations.ls, "read"),
    Call("GET", "/operations/{reference}", _operations.show, "read"),
    Call("POST", "/operations/{reference}/cancel", _operations.cancel, "operate"),
    Call("POST", "/operations/{reference}/retry", _operations.retry, "operate"),
    Call("GET", "/pools", _pools.ls, "read"),
    Call("POST", "/pools", _pools.fill, "operate"),
    Call("POST", "/pools/take", _pools.take, "operate"),
    Call("DELETE", "/pools", _pools.rm, "operate"),
    Call("GET", "/networks", _networks.ls, "read"),
    Call("POST", "/networks", _networks.create, "operate"),
    Call("GET", "/networks/{reference}", _networks.show, "read"),
    Call("DELETE", "/networks/{reference}", _networks.rm, "operate"),
    Call("POST", "/networks/{reference}/exec", _networks.exec, "admin"),
    Call("GET", "/groups", _groups.ls, "read"),
    Call("POST", "/groups", _groups.create, "operate"),
    Call("GET", "/groups/{name}", _groups.show, "read"),
    Call("PUT", "/groups/{name}", _groups.set, "operate"),
    Call("DELETE", "/groups/{name}", _groups.rm, "operate"),
    Call("GET", "/backups", _backups.ls, "admin"),
    Call("GET", "/backups/unreadable", _backups.unreadable, "admin"),
    Call("GET", "/backup", _backups.show, "admin"),
    Call("POST", "/backups/verify", _backups.verify, "admin"),
    Call("POST", "/backups/prune", _backups.prune, "admin"),
    Call("POST", "/backups/restore", _backups.restore, "admin"),
)
_BY_METHOD = {(call.target, call.method.__name__): call for call in CALLS}


def of(method: Callable[..., Any]) -> Call:
    """The call of a method of the façade."""
    return _BY_METHOD[method.__qualname__.partition(".")[0], method.__name__]


def scope_of(call: Call, given: Struct | None) -> Scope:
    """What a token must be good for to ask for just that: what reaches into the host takes more than its call does.

    Folders of the host's, its bridges, and a QEMU without its barriers are for admins. A regular expression may keep
    the agent busy, so it takes more than looking.
    """
    shares = bool(getattr(given, "shares", ()))
    unguarded = getattr(given, "isolation", None) == "none"
    on_bridge = getattr(given, "mode", None) == "bridge"
    if shares or unguarded or on_bridge:
        return "admin"
    searches = call.method.__name__ == "wait" and getattr(given, "text", None) is not None
    return "operate" if searches else call.scope


class Parameter(Struct, frozen=True):
    """One argument of a call."""

    name: str
    type: Any
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@cache
def parameters(call: Call) -> tuple[Parameter, ...]:
    """The arguments that travel: all but the object itself, and the receiver of its progress."""
    hints = get_type_hints(call.method, include_extras=True)
    found = list(inspect.signature(call.method).parameters.values())[1:]
    return tuple(
        Parameter(each.name, _on_the_wire(each, hints[each.name]), _default(each))
        for each in found
        if each.name != "report"
    )


def _on_the_wire(parameter: inspect.Parameter, hint: Any) -> Any:
    """Paths are text, `"tiny"` for a request's first field is the request, and any sequence is an array."""
    from pathlib import Path

    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return tuple[hint, ...]
    if get_origin(hint) is Sequence:
        return tuple[get_args(hint)[0], ...]  # type: ignore[misc]  # known at run time only
    parts = get_args(hint)
    if Path in parts:
        return Union[tuple(part for part in parts if part is not Path)]  # noqa: UP007  # built of a tuple
    if struct := next((part for part in parts if _is_struct(part)), None):
        return struct
    return hint


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return ()
    return parameter.default


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def in_path(call: Call) -> tuple[Parameter, ...]:
    return tuple(each for each in parameters(call) if f"{{{each.name}}}" in call.path)


def in_query(call: Call) -> tuple[Parameter, ...]:
    if call.http not in ("GET", "DELETE"):
        return ()
    return tuple(each for each in parameters(call) if each not in in_path(call))


@cache
def body(call: Call) -> type[Struct] | None:
    """What the JSON object is. None for a call without one."""
    if call.http in ("GET", "DELETE"):
        return None
    rest = [each for each in parameters(call) if each not in in_path(call)]
    if not rest:
        return None
    if is_whole_body(call):
        return rest[0].type  # type: ignore[no-any-return]
    fields = [
        (each.name, each.type) if each.required else (each.name, each.type, each.default)
        for each in sorted(rest, key=lambda each: not each.required)
    ]
    # With a word more than `VmRestart`, which generators call the type of a VM's field `restart`.
    name = "".join(part.title() for part in call.name.replace("_", ".").split(".")) + "Body"
    return msgspec.defstruct(name, fields, kw_only=True, frozen=True, forbid_unknown_fields=True)


@cache
def is_whole_body(call: Call) -> bool:
    rest = [each for each in parameters(call) if each not in in_path(call)]
    return len(rest) == 1 and _is_struct(rest[0].type)


@cache
def returned(call: Call) -> Any:
    """What the method returns."""
    return get_type_hints(call.method)["return"]


def result(call: Call) -> Any:
    """What the JSON of the answer is."""
    if returned(call) is AsyncCopies:
        return list[VmInfo]
    return VmInfo if returned(call) is api.AsyncVm else returned(call)


def arguments(call: Call, values: Mapping[str, Any], given: Struct | None) -> tuple[list[Any], dict[str, Any]]:
    """The arguments for the method: from path and query (`values`), and from the JSON object that was given."""
    found: dict[str, Any] = dict(values)
    if given is not None:
        whole = is_whole_body(call)
        only = next(each.name for each in parameters(call) if each not in in_path(call)) if whole else ""
        found |= {only: given} if whole else msgspec.structs.asdict(given)
    spread = [
        name for name, each in inspect.signature(call.method).parameters.items() if each.kind is each.VAR_POSITIONAL
    ]
    return [item for name in spread for item in found.pop(name, ())], found
