"""Long lists come in pages, and of what is asked for only; clients of ours follow the pages."""

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.helpers.agents import agent
from tests.helpers.api_client import api

from atoll.layout import Layout
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place, Wire

pytestmark = pytest.mark.vm


@pytest.fixture
async def client(layout: Layout) -> AsyncIterator[httpx.AsyncClient]:
    async with agent(layout), api(layout) as made:
        for number in range(5):
            asked = {"name": f"vm-{number}", "memory": "64MiB", "labels": {"odd": str(number % 2), f"n{number}": ""}}
            assert (await made.post("/v1/vms", json=asked | {"disks": [{"size": "1MiB"}]})).status_code == 200
        yield made
        for each in (await made.get("/v1/vms")).json():
            await made.delete(f"/v1/vms/{each['vm']['id']}")


def next_page(answer: httpx.Response) -> str | None:
    found = re.fullmatch('<(.*)>; rel="next"', answer.headers.get("link", ""))
    return found[1] if found else None


async def pages(client: httpx.AsyncClient, path: str, **query: Any) -> list[list[Any]]:
    answer = await client.get(path, params=query)
    found = [answer.json()]
    while more := next_page(answer):
        answer = await client.get(more)
        found.append(answer.json())
    return found


def names(vms: list[Any]) -> list[str]:
    return [each["vm"]["name"] for each in vms]


async def test_vms_come_in_pages(client: httpx.AsyncClient) -> None:
    assert [names(each) for each in await pages(client, "/v1/vms", limit=2)] == [
        ["vm-0", "vm-1"],
        ["vm-2", "vm-3"],
        ["vm-4"],
    ]
    assert len(await pages(client, "/v1/vms", limit=5)) == 1


async def test_a_place_in_the_list_outlives_what_was_there(client: httpx.AsyncClient) -> None:
    more = next_page(await client.get("/v1/vms", params={"limit": 2}))
    assert more is not None
    await client.delete("/v1/vms/vm-1")
    assert names((await client.get(more)).json()) == ["vm-2", "vm-3"]


async def test_lists_have_what_is_asked_for_only(client: httpx.AsyncClient) -> None:
    for query, expected in (
        ({"name": "vm-3"}, ["vm-3"]),
        ({"name": "*-[12]"}, ["vm-1", "vm-2"]),
        ({"label": "odd=1"}, ["vm-1", "vm-3"]),
        ({"label": ["odd=1", "n3"]}, ["vm-3"]),
        ({"state": "stopped", "label": "odd=1"}, ["vm-1", "vm-3"]),
        ({"state": ["running", "paused"]}, []),
    ):
        assert names((await client.get("/v1/vms", params=query)).json()) == expected, query
    assert [names(each) for each in await pages(client, "/v1/vms", limit=1, label="odd=1")] == [["vm-1"], ["vm-3"]]


async def test_the_journal_and_tasks_come_the_newest_first(client: httpx.AsyncClient) -> None:
    for path, name in (("/v1/operations", "subject_name"), ("/v1/tasks", "subject")):
        found = await pages(client, path, limit=2)
        assert [len(each) for each in found] == [2, 2, 1]
        assert [each[name] for page in found for each in page] == [f"vm-{number}" for number in (4, 3, 2, 1, 0)]
    assert (await client.get("/v1/operations", params={"state": "stuck"})).json() == []
    assert len((await client.get("/v1/tasks", params={"state": "done", "name": "vm-[01]"})).json()) == 2


async def test_events_are_found_by_name_and_kind(client: httpx.AsyncClient) -> None:
    found = await pages(client, "/v1/events/past", limit=2, kind="vm.created")
    assert [[each["name"] for each in page] for page in found] == [["vm-0", "vm-1"], ["vm-2", "vm-3"], ["vm-4"]]
    events = (await client.get("/v1/events/past", params={"name": "vm-1"})).json()
    assert {each["name"] for each in events} == {"vm-1"}


async def test_what_is_no_page_is_refused(client: httpx.AsyncClient) -> None:
    for query in ({"limit": 0}, {"limit": 1001}, {"after": "nowhere"}, {"state": "asleep"}):
        refused = await client.get("/v1/vms", params=query)
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid-input"), query


async def test_the_client_follows_the_pages(client: httpx.AsyncClient, layout: Layout) -> None:
    place = Place(url="http://atoll", socket=str(layout.agent_socket))
    wire = Wire(place)
    assert names(await wire.get("/v1/vms", list[Any], query={"limit": 2})) == [f"vm-{number}" for number in range(5)]
    await wire.close()
    async with RemoteHost(place) as host:
        assert [each.vm.name for each in await host.ls()] == [f"vm-{number}" for number in range(5)]
