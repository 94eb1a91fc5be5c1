"""Writes docs/reference/: the HTTP API by its OpenAPI document, the SDK by its docstrings. `./dev docs` runs it."""

import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atoll.agent.access import Access
from atoll.agent.app import make_app
from atoll.agent.document import HEADERS, complete
from atoll.agent.handlers import Agent
from atoll.layout import Layout
from atoll.platform import api, routes
from atoll.platform.local import LocalHost

FOLDER = Path(__file__).parent / "reference"
GENERATED = "<!-- `./dev docs` writes this page. -->\n"
CLASSES = (
    api.AsyncHost, api.AsyncVm, api.AsyncImages, api.AsyncNetworks, api.AsyncGroups, api.AsyncOperations,
    api.AsyncPools, api.AsyncBackups, api.Terminal,
)  # fmt: skip
Json = dict[str, Any]


def pages() -> dict[str, str]:
    """File name -> content."""
    return {"api.md": "\n".join(_api(_document())), "sdk.md": "\n".join(_sdk())}


def _document() -> Json:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        layout = Layout(data=home / "data", cache=home / "cache", run=home / "run")
        return complete(make_app(Agent(LocalHost(layout), Access(layout))).openapi_schema.to_schema())


def _api(document: Json) -> Iterator[str]:
    yield GENERATED
    yield "# Reference: the HTTP API\n"
    yield "How it is used: [the guide](../guide/api.md). The same as OpenAPI: `/v1/schema/openapi.json` of an agent."
    yield "Each call may also be refused with a `Problem`: "
    yield ", ".join(f"{name.removeprefix('Problem')}" for name in document["components"]["responses"]) + ".\n"
    scopes = {call.name.replace(".", "_"): call.scope for call in routes.CALLS}
    for tag in document["tags"]:
        yield f"## {tag['name']}\n\n{tag['description']}\n"
        for path, item in document["paths"].items():
            for http, operation in item.items():
                if isinstance(operation, dict) and tag["name"] in operation.get("tags", []):
                    yield from _operation(http, path, operation, scopes.get(operation["operationId"], ""))
    yield "## Headers\n"
    for header, (_, text) in HEADERS.items():
        yield f"- `{header}`: {text}"
    yield "\n## Types\n"
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _type(name, schema)


def _operation(http: str, path: str, operation: Json, scope: str) -> Iterator[str]:
    yield f"### `{http.upper()} {path}`\n"
    yield operation["description"] + "\n"
    headers = [f"`{each['name']}`" for each in operation.get("parameters", []) if each["in"] == "header"]
    for each in operation.get("parameters", []):
        if each["in"] == "header":
            continue
        needed = "" if each.get("required") else ", optional"
        text = f": {each['description']}" if each.get("description") else ""
        yield f"- `{each['name']}` ({each['in']}, {_kind(each['schema'])}{needed}){text}"
    if headers:
        yield f"- [headers](#headers): {', '.join(headers)}"
    if (body := operation.get("requestBody")) is not None:
        ((media, content),) = body["content"].items()
        yield f"- body: {_kind(content['schema']) if media == 'application/json' else f'`{media}`'}"
    told = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
    for media, content in told.get("content", {}).items():
        yield f"- answer: {_kind(content['schema']) if media == 'application/json' else f'`{media}`'}"
    if scope:
        yield f"- scope: {scope}"
    yield ""


def _type(name: str, schema: Json) -> Iterator[str]:
    yield f"### {name}\n"
    if text := schema.get("description"):
        yield text + "\n"
    if "enum" in schema:
        yield _kind(schema) + "\n"
    if properties := schema.get("properties"):
        yield "| field | type | |\n|---|---|---|"
        for field, told in properties.items():
            needed = " (needed)" if field in schema.get("required", []) else ""
            yield f"| `{field}` | {_kind(told)}{needed} | {' '.join(told.get('description', '').split())} |"
        yield ""


def _kind(schema: Json) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return " or ".join(f"`{each}`" for each in schema["enum"] if each is not None)
    if several := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return " or ".join(_kind(each) for each in several)
    kinds = schema.get("type", "anything")
    if kinds == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    if kinds == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def _sdk() -> Iterator[str]:
    yield GENERATED
    yield "# Reference: the SDK\n"
    yield "How it is used: [the guide](../guide/sdk.md). `atoll.connect_async()` gives an `AsyncHost`; what"
    yield "`atoll.connect()` gives has the same names, without `await`. Requests and results: [types](api.md#types).\n"
    for each in CLASSES:
        yield f"## {each.__name__}\n"
        if each.__doc__:
            yield inspect.cleandoc(each.__doc__) + "\n"
        for name, member in vars(each).items():
            if not name.startswith("_"):
                yield from _member(name, member)


def _member(name: str, member: Any) -> Iterator[str]:
    if isinstance(member, property):
        returned = inspect.signature(member.fget).return_annotation  # type: ignore[arg-type]
        yield f"### `{name}: {_shown(returned)}`\n"
    elif inspect.isfunction(member):
        signature = inspect.signature(member)
        parameters = list(signature.parameters.values())[1:]
        given = _shown(signature.replace(parameters=parameters))
        yield f"### `{'await ' if inspect.iscoroutinefunction(member) else ''}{name}{given}`\n"
        if text := inspect.getdoc(member):
            yield text + "\n"


def _shown(told: Any) -> str:
    """An annotation as people write it."""
    text = told if isinstance(told, str) else inspect.formatannotation(told) if isinstance(told, type) else str(told)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("'", "").replace("NoneType", "None")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, content in pages().items():
        (FOLDER / name).write_text(content)
        sys.stderr.write(f"{FOLDER / name}\n")


if __name__ == "__main__":
    main()
