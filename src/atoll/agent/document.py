"""The OpenAPI document: Litestar's, completed with what it can't know.

Types are msgspec's own schemas (with limits, defaults, and the sentences of the code); errors are problems (RFC 9457);
what is asked and told in headers stands there; bytes and events have their media types; each body has an example.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
from litestar import Request
from litestar.openapi.plugins import JsonRenderPlugin
from msgspec import Struct

from atoll.agent import examples
from atoll.agent.matching import can_match
from atoll.agent.problems import PROBLEM_TYPE
from atoll.agent.texts import field_texts
from atoll.model.task import Problem, Task
from atoll.model.vm import Event
from atoll.platform import routes
from atoll.platform.routes import Call

Json = dict[str, Any]
_REF = "#/components/schemas/"
_EVENTS = "text/event-stream"

_TAGS = {
    "vms": "Virtual machines: their life, devices, history, and what goes on in them.",
    "images": "What VMs are made from.",
    "networks": "Networks that VMs share. They come up when a VM on them starts.",
    "groups": "Security groups: rules for cards on networks.",
    "pools": "Copies of snapshots that are started already, and wait.",
    "backups": "Folders of backups, on the host.",
    "bundles": "VMs and snapshots as one file.",
    "uploads": "Large files on their way to the agent, in pieces.",
    "host": "The computer itself.",
    "tasks": "Requests that change something, while they are at work and after.",
    "operations": "The journal: each verb with its steps.",
    "events": "What happens.",
    "access": "Who may, and who did what.",
}
_TAG_OF = {
    "clone": "vms", "fork": "vms", "diff": "vms", "image": "images", "catalogue": "images", "backup": "backups",
    "prune": "host", "fsck": "host", "memory": "host", "stop": "host",
}  # fmt: skip

_MEDIA = {
    "vm_logs": "application/octet-stream",
    "vm_screenshot": "image/png",
    "vm_capture": "application/vnd.tcpdump.pcap",
    "host_export": "application/x-tar",
    "exports_fetch": "application/x-tar",
    "tasks_follow": _EVENTS,
    "events_follow": _EVENTS,
    "audit_follow": "application/x-ndjson",
    "authority_show": "application/x-pem-file",
    "agent_metrics": "text/plain; version=0.0.4",
}
"""What answers are that aren't JSON."""
_UPLOADS = {"host_import": "application/x-tar", "uploads_send": "application/octet-stream"}
_AS_TASKS = {"host_import", "images_import_file", "exports_write"}
"""What isn't in the table of calls, and may go on after its answer."""

_PROBLEMS = {
    400: "The request can't be used as it is.",
    401: "The agent doesn't know who asks.",
    403: "Who asks may not do that.",
    404: "What it is about isn't there.",
    405: "There is no such call.",
    408: "The rest of the request didn't come.",
    409: "The state of things forbids it, or others are at work on it.",
    412: "It was changed meanwhile (`If-Match`); nothing was done.",
    413: "The request is too large.",
    422: "This computer, or this VM, can't do that.",
    424: "Something that it depends on refused: the guest, QEMU, a server elsewhere.",
    429: "Too many requests; `Retry-After` says when the next may come.",
    500: "A mistake of Atoll's.",
    503: "The agent can't do its work; the problem says why.",
    507: "The disk is full, or can't be used.",
}
_ONLY_CHANGES = {412}
_ONLY_OF = {503: "agent_ready"}

HEADERS: dict[str, tuple[Json, str]] = {
    "Prefer": (
        {"type": "string", "pattern": r"^(respond-async|wait=\d{1,3})$", "examples": ["respond-async"]},
        "`respond-async` answers at once with 202 and the task, `wait=N` after so many seconds at most; else 30.",
    ),
    "Idempotency-Key": (
        {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,200}$"},
        "Made up by the client. The same request with the same key is done once, and answered again.",
    ),
    "If-Match": (
        {"type": "string", "pattern": '^("[0-9a-f]{16}-[0-9a-f]{16}"|\\*)$'},
        "The `ETag` that the thing had when it was read. If it was changed since, 412, and nothing is done.",
    ),
    "If-None-Match": (
        {"type": "string", "pattern": '^"[0-9a-f]{16}-[0-9a-f]{16}"$'},
        "The `ETag` of what is known already: 304 if it is still that.",
    ),
    "Range": (
        {"type": "string", "pattern": r"^bytes=\d{1,15}-\d{0,15}$", "examples": ["bytes=1048576-"]},
        "The rest of what came already.",
    ),
    "Last-Event-ID": (
        {"type": "string", "pattern": r"^\d{1,15}$"},
        "The last event that came before a connection was lost; the stream goes on behind it.",
    ),
}
_ANSWERED = {
    "ETag": "Of the thing, for `If-Match` and `If-None-Match`.",
    "Atoll-Task": "The id of the task.",
    "Location": "Where the task is told.",
    "Retry-After": "Seconds.",
}


class DocumentPlugin(JsonRenderPlugin):
    """Serves the completed document."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: Json) -> bytes:
        return msgspec.json.encode(complete(openapi_schema))


def complete(litestars: Json) -> Json:
    """The whole document, of what Litestar makes."""
    document: Json = msgspec.json.decode(msgspec.json.encode(litestars, enc_hook=str))
    document["paths"] = {path: item for path, item in document["paths"].items() if "/schema" not in path}
    document["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items()]
    schemas, components = _types()
    document["components"]["schemas"] |= components
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "A token of `atoll token create`."}
    }
    # Nobody shows a token to the local socket, nor where he has a certificate.
    document["security"] = [{"bearer": []}, {}]
    document["components"]["responses"] = {f"Problem{status}": _problem(status) for status in _PROBLEMS}
    calls = {call.name.replace(".", "_"): call for call in routes.CALLS}
    for path, http, operation in _operations(document):
        call = calls.get(operation["operationId"])
        _tidy(path, operation)
        if call is not None:
            _of_call(operation, call, schemas)
        _bytes(operation)
        _headers(http, operation, call)
        _problems(http, operation)
    return document


def _operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in document["paths"].items():
        for http in ("get", "head", "post", "put", "patch", "delete"):
            if http in item:
                yield path, http, item[http]


@cache
def _types() -> tuple[dict[Any, Json], Json]:
    """The schema of each type that travels, and all types by their names."""
    wanted: list[Any] = [Problem, Task, Event]
    for call in routes.CALLS:
        wanted += [routes.result(call), routes.body(call)]
    unique = list(dict.fromkeys(each for each in wanted if each is not None))
    found, components = msgspec.json.decode(
        msgspec.json.encode(msgspec.json.schema_components(unique, ref_template=_REF + "{name}"))
    )
    for name, schema in components.items():
        _adapt(schema)
        _describe(schema, name)
    for kind, example in examples.ANSWERS.items():
        components[kind.__name__]["examples"] = [msgspec.to_builtins(example)]
    schemas = dict(zip(unique, found, strict=True))
    for schema in schemas.values():
        _adapt(schema)
    return schemas, components


def _describe(schema: Json, name: str) -> None:
    """What the code says about the fields."""
    fields = schema.get("properties", {})
    for kind in _structs(Struct):
        # The name alone isn't enough: other parts of the package have types of their own by it.
        if kind.__name__ == name and set(kind.__struct_encode_fields__) == set(fields):
            for field, text in field_texts(kind).items():
                if field in fields:
                    fields[field]["description"] = text


def _structs(kind: type[Struct]) -> Iterator[type[Struct]]:
    for each in kind.__subclasses__():
        if each.__module__.startswith("atoll."):
            yield each
        yield from _structs(each)


def _adapt(schema: Any) -> None:
    """Generators know less of JSON Schema than msgspec does."""
    if isinstance(schema, list):
        for each in schema:
            _adapt(each)
    if not isinstance(schema, dict):
        return
    if schema.get("items") is False:
        items = schema.pop("prefixItems")
        kinds = [each for at, each in enumerate(items) if each not in items[:at]]
        schema["items"] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    values = schema.get("enum", [])
    if isinstance(values, list) and values and "type" not in schema:
        schema["type"] = ["string", "null"] if None in values else "string"
    for name, each in schema.items():
        if name not in ("default", "enum", "examples"):
            _adapt(each)


def _tidy(path: str, operation: Json) -> None:
    first = path.split("/")[2] if path.startswith(routes.VERSION) else "host"
    operation["tags"] = [_TAG_OF.get(tag, tag) for tag in operation.get("tags", [first])]
    summary, _, rest = operation.pop("description", operation["summary"]).partition("\n")
    operation |= {"summary": summary.rstrip("."), "description": f"{summary}\n{rest}".strip()}
    operation.pop("deprecated", None)
    for each in operation.get("parameters", []):
        for noise in ("deprecated", "allowEmptyValue", "allowReserved"):
            each.pop(noise, None)
        # In a query nothing stands for null; who means it leaves the parameter away.
        kinds = [kind for kind in each["schema"].get("oneOf", []) if kind != {"type": "null"}]
        if len(kinds) == 1:
            each["schema"] = kinds[0]
        if each["name"] == "vm" and each["in"] == "path":
            each["description"] = "Its name, its id, or the beginning of one of them that no other has."


def _of_call(operation: Json, call: Call, schemas: dict[Any, Json]) -> None:
    """Body and answer, of the types themselves."""
    if (body := routes.body(call)) is not None:
        content: Json = {"schema": schemas[body]}
        if (example := examples.body_of(call)) is not None:
            content["example"] = example
        required = any(field.required for field in msgspec.structs.fields(body))
        operation["requestBody"] = {"content": {"application/json": content}, "required": required}
    result = routes.result(call)
    schema = {"type": "null"} if result in (None, type(None)) else schemas[result]
    operation["responses"]["200"] = {
        "description": "Done." if call.changes else "As it is now.",
        "content": {"application/json": {"schema": schema}},
    }


def _bytes(operation: Json) -> None:
    if media := _MEDIA.get(operation["operationId"]):
        text = media == _EVENTS or media.startswith("text/")
        schema = {"type": "string"} if text else {"type": "string", "format": "binary"}
        operation["responses"]["200"]["content"] = {media: {"schema": schema}}
    if media := _UPLOADS.get(operation["operationId"]):
        schema = {"type": "string", "format": "binary"}
        operation["requestBody"] = {"content": {media: {"schema": schema}}, "required": True}


def _headers(http: str, operation: Json, call: Call | None) -> None:
    responses, asked = operation["responses"], []
    if call is not None and not call.changes:
        asked.append("If-None-Match")
        responses["304"] = {"description": "It is what you know."}
        responses["200"]["headers"] = _answered("ETag")
    elif call is not None or operation["operationId"] in _AS_TASKS:
        asked += ["Prefer", "Idempotency-Key"]
        if call is not None and can_match(call):
            asked.append("If-Match")
        responses["200"]["headers"] = _answered("Atoll-Task")
        responses["202"] = {
            "description": "It goes on: ask for the task until it has ended.",
            "content": {"application/json": {"schema": {"$ref": _REF + "Task"}}},
            "headers": _answered("Atoll-Task", "Location"),
        }
    elif operation["operationId"] == "exports_fetch":
        asked.append("Range")
        responses["206"] = {"description": "The part that was asked for.", "content": responses["200"]["content"]}
    elif operation["operationId"] == "events_follow":
        asked.append("Last-Event-ID")
    for name in asked:
        schema, text = HEADERS[name]
        told = {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
        operation.setdefault("parameters", []).append(told)


def _answered(*names: str) -> Json:
    return {name: {"description": _ANSWERED[name], "schema": {"type": "string"}} for name in names}


def _problems(http: str, operation: Json) -> None:
    for status in _PROBLEMS:
        mine = operation["operationId"] == _ONLY_OF.get(status, operation["operationId"])
        if mine and (status not in _ONLY_CHANGES or http != "get"):
            operation["responses"][str(status)] = {"$ref": f"#/components/responses/Problem{status}"}


def _problem(status: int) -> Json:
    content = {PROBLEM_TYPE: {"schema": {"$ref": _REF + "Problem"}}}
    told: Json = {"description": _PROBLEMS[status], "content": content}
    if status == 429:
        told["headers"] = _answered("Retry-After")
    return told
