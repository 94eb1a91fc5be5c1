"""The OpenAPI document: it's valid, whole, and a client that a generator makes of it works."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from openapi_spec_validator import validate
from tests.helpers.agents import agent
from tests.helpers.images import adopt_cached

from atoll.agent import examples
from atoll.layout import Layout
from atoll.platform import routes

BYTES = (
    "image/png",
    "application/x-pem-file",
    "application/x-ndjson",
    "application/x-tar",
    "application/vnd.tcpdump.pcap",
)
"""What the generator doesn't know is like `application/octet-stream` to it."""


def ask(layout: Layout, path: str) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(layout.agent_socket)), base_url="http://atoll") as client:
        return client.get(path, timeout=30)


@pytest.fixture
async def document(layout: Layout) -> dict[str, Any]:
    async with agent(layout):
        found: dict[str, Any] = ask(layout, "/v1/schema/openapi.json").json()
    return found


async def test_the_document_is_valid_and_says_what_there_is(document: dict[str, Any]) -> None:
    validate(document)
    operations = [
        operation for item in document["paths"].values() for operation in item.values() if "operationId" in operation
    ]
    names = [each["operationId"] for each in operations]
    assert len(set(names)) == len(names)
    assert {call.name.replace(".", "_") for call in routes.CALLS} <= set(names)
    tags = {each["name"] for each in document["tags"]}
    for each in operations:
        assert set(each["tags"]) <= tags, each["operationId"]
        assert each["responses"]["404"] == {"$ref": "#/components/responses/Problem404"}
        assert " " in each["summary"] and each["summary"][0].isupper(), each["operationId"]
    create = document["paths"]["/v1/vms"]["post"]
    assert [each["name"] for each in create["parameters"]] == ["Prefer", "Idempotency-Key"]
    assert set(create["responses"]["202"]["headers"]) == {"Location", "Atoll-Task"}
    events = document["paths"]["/v1/events"]["get"]
    assert list(events["responses"]["200"]["content"]) == ["text/event-stream"]
    assert "Last-Event-ID" in [each["name"] for each in events["parameters"]]
    request = document["components"]["schemas"]["CreateRequest"]
    assert request["properties"]["image"]["description"].startswith("A reference to an image")


def test_each_body_has_an_example_that_can_be_sent() -> None:
    with_a_body = [call for call in routes.CALLS if routes.body(call) is not None]
    assert {call.name for call in with_a_body} == set(examples.BODIES)
    for call in with_a_body:
        kind = routes.body(call)
        assert kind is not None
        msgspec.convert(examples.body_of(call), kind)


@pytest.mark.vm
async def test_a_client_that_is_generated_runs_a_vm(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await adopt_cached("tiny", layout)
    async with agent(layout):
        (tmp_path / "openapi.json").write_bytes(ask(layout, "/v1/schema/openapi.json").content)
        generate(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        client = importlib.import_module("atoll_client").Client(
            base_url="http://atoll",
            timeout=httpx.Timeout(120),
            httpx_args={"transport": httpx.AsyncHTTPTransport(uds=str(layout.agent_socket))},
        )
        calls = {
            name: importlib.import_module(f"atoll_client.api.vms.{name}")
            for name in ("host_create", "host_ls", "vm_start", "vm_info", "vm_exec", "vm_rm")
        }
        models = importlib.import_module("atoll_client.models")

        created = await calls["host_create"].asyncio(
            client=client, body=models.CreateRequest(image="tiny", name="web", memory="128MiB")
        )
        assert created.vm.name == "web"
        await calls["vm_start"].asyncio_detailed("web", client=client, body=models.VmStartBody(wait=True))
        assert [each.phase for each in await calls["host_ls"].asyncio(client=client)] == ["running"]
        command = models.VmExec(command=models.ExecRequest(argv=["echo", "hello"]))
        said = await calls["vm_exec"].asyncio("web", client=client, body=command)
        assert (said.exit_code, said.stdout) == (0, "aGVsbG8K")
        assert await calls["vm_rm"].asyncio("web", client=client, force=True) == 0
        refused = await calls["vm_info"].asyncio("web", client=client)
        assert (refused.status, refused.code) == (404, "not-found")


def generate(folder: Path) -> None:
    """A package `atoll_client` of the `openapi.json` in the folder; a warning of the generator's is a failure."""
    overrides = "".join(f"  {each}: application/octet-stream\n" for each in BYTES)
    (folder / "config.yaml").write_text(
        "post_hooks: []\ncontent_type_overrides:\n"
        f"{overrides}  text/event-stream: text/plain\n  application/problem+json: application/json\n"
    )
    program = Path(sys.executable).parent / "openapi-python-client"
    command = [program, "generate", "--meta", "none", "--fail-on-warning", "--config", folder / "config.yaml"]
    made = subprocess.run(
        [*command, "--path", folder / "openapi.json", "--output-path", folder / "atoll_client"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
