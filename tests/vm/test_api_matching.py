"""Of two clients that change one thing at once, one wins and the other is told: ETag, If-Match, If-None-Match."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.helpers.agents import agent, remote_agent, trusting
from tests.helpers.api_client import api

from atoll.errors import AtollError
from atoll.layout import Layout
from atoll.model.requests import SetRequest
from atoll.platform.local import LocalHost
from atoll.store.tokens import Tokens

pytestmark = pytest.mark.vm
WEB = "/v1/vms/web"


@pytest.fixture
async def client(layout: Layout) -> AsyncIterator[httpx.AsyncClient]:
    async with agent(layout), api(layout) as made:
        created = await made.post("/v1/vms", json={"name": "web", "memory": "128MiB", "disks": [{"size": "1GiB"}]})
        assert created.status_code == 200, created.text
        yield made
        await made.delete(WEB, params={"force": True})


async def tag(client: httpx.AsyncClient, path: str = WEB) -> str:
    return str((await client.get(path)).headers["etag"])


async def set_label(client: httpx.AsyncClient, value: str, if_match: str) -> httpx.Response:
    return await client.patch(WEB, json={"labels": {"by": value}}, headers={"If-Match": if_match})


async def labels(client: httpx.AsyncClient) -> Any:
    return (await client.get(WEB)).json()["vm"]["labels"]


async def test_of_two_at_once_one_wins(client: httpx.AsyncClient, layout: Layout) -> None:
    async with api(layout) as other:
        for _ in range(10):
            known = await tag(client)
            answers = await asyncio.gather(set_label(client, f"a{known}", known), set_label(other, f"b{known}", known))
            assert sorted(each.status_code for each in answers) == [200, 412]
            winner = "a" if answers[0].status_code == 200 else "b"
            assert await labels(client) == {"by": f"{winner}{known}"}
    refused = next(each.json() for each in answers if each.status_code == 412)
    assert (refused["code"], refused["next_step"]) == ("changed", "Read it again, and decide anew.")


async def test_of_one_over_https_and_one_in_this_process_one_wins(layout: Layout) -> None:
    async with remote_agent(layout) as url, LocalHost(layout) as host:
        headers = {"Authorization": f"Bearer {Tokens(layout.tokens).create('ops', scope='operate')[1]}"}
        async with httpx.AsyncClient(base_url=url, verify=trusting(layout), headers=headers, timeout=60) as client:
            await client.post("/v1/vms", json={"name": "web", "memory": "128MiB", "disks": [{"size": "1GiB"}]})
            web = await host.get("web")
            for count in range(3):
                there, here = await asyncio.gather(
                    client.post(f"{WEB}/start"), web.start(wait=False), return_exceptions=True
                )
                assert isinstance(there, httpx.Response)
                lost = there.json()["code"] if there.status_code != 200 else getattr(here, "code", None)
                assert (there.status_code == 200) is isinstance(here, AtollError), (there.text, here)
                assert lost in ("wrong-state", "busy")
                assert (await client.get(WEB)).json()["phase"] == "running"
                await web.stop(force=True)
                # Who insists on what has gone by is told, also by a change past the agent.
                known = await tag(client)
                await web.set(SetRequest(labels={"by": str(count)}))
                assert (await set_label(client, "late", known)).status_code == 412
                assert await labels(client) == {"by": str(count)}
            await web.rm(force=True)


async def test_one_wins_against_those_who_insist_on_nothing(client: httpx.AsyncClient) -> None:
    known = await tag(client)
    await client.patch(WEB, json={"cpus": 2})
    for refused in (
        await set_label(client, "late", known),
        await client.delete(WEB, headers={"If-Match": known}),
        await client.post(f"{WEB}/rename", json={"name": "www"}, headers={"If-Match": known}),
        await client.post(f"{WEB}/start", headers={"If-Match": known}),
    ):
        assert refused.status_code == 412, refused.text
    assert await labels(client) == {}
    assert (await client.get(WEB)).json()["phase"] == "stopped"
    assert (await set_label(client, "again", await tag(client))).status_code == 200


async def test_a_start_is_no_change_of_the_settings(client: httpx.AsyncClient) -> None:
    before = await tag(client)
    assert (await client.post(f"{WEB}/start")).status_code == 200
    after = await tag(client)
    assert before != after
    assert (await client.get(WEB, headers={"If-None-Match": before})).json()["phase"] == "running"
    assert (await set_label(client, "running", before)).status_code == 200
    assert (await set_label(client, "anyhow", "*")).status_code == 200


async def test_what_is_known_is_not_sent_again(client: httpx.AsyncClient) -> None:
    for path in ("/v1/vms", WEB, f"{WEB}/disks"):
        known = await client.get(path)
        again = await client.get(path, headers={"If-None-Match": known.headers["etag"]})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", known.headers["etag"])


async def test_networks_and_groups_have_versions_too(client: httpx.AsyncClient) -> None:
    await client.post("/v1/groups", json={"name": "web", "rules": ["allow in tcp 80 from any"]})
    known = await tag(client, "/v1/groups/web")
    rules = {"rules": ["allow in tcp 443 from any"]}
    assert (await client.put("/v1/groups/web", json=rules, headers={"If-Match": known})).status_code == 200
    assert (await client.put("/v1/groups/web", json=rules, headers={"If-Match": known})).status_code == 412
    await client.post("/v1/networks", json={"name": "lab"})
    old = {"If-Match": '"0123456789abcdef-0123456789abcdef"'}
    assert (await client.delete("/v1/networks/lab", headers=old)).status_code == 412
    known = await tag(client, "/v1/networks/lab")
    assert (await client.delete("/v1/networks/lab", headers={"If-Match": known})).status_code == 200


async def test_what_has_no_version_refuses_to_be_insisted_on(client: httpx.AsyncClient) -> None:
    refused = await client.post("/v1/prune", json={}, headers={"If-Match": '"x"'})
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid-input")
