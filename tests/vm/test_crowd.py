"""Many at once: commands that don't know of each other, and more VMs than fit on a screen."""

import json
from collections.abc import Awaitable, Callable, Sequence

import pytest
import yaml
from bench.sdk import fill
from tests.helpers.command import Ended, all_at_once, atoll
from tests.helpers.ports import free_port
from tests.helpers.world import disagreements

from atoll.layout import Layout

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SMALL = ("tiny", "--memory", "96MiB", "--quiet")
PutImage = Callable[[str], Awaitable[str]]


def names() -> list[str]:
    return atoll("ls", "--quiet").out.split()


@pytest.mark.parametrize("attended", [3, pytest.param(20, marks=pytest.mark.slow)])
async def test_twenty_runs_at_once_all_succeed(attended: int, layout: Layout, with_image: PutImage) -> None:
    """Some run a command in a guest; the others' guests are empty PCs, since twenty boots take a minute."""
    await with_image("tiny")
    with_command = ("run", *SMALL, "--", "sh", "-c", 'echo "here is $(hostname)"')
    detached = ("run", "--detach", "--disk-size", "1MiB", "--display", "none", "--memory", "96MiB", "--quiet")
    ran = all_at_once([with_command] * attended + [detached] * (20 - attended))
    assert [(each.code, each.err) for each in ran] == [(0, "")] * 20
    listed = json.loads(atoll("ls", "--format", "json").out)
    assert {info["phase"] for info in listed} == {"running"}
    assert len({info["vm"]["name"] for info in listed}) == 20
    assert len({info["vm"]["spec"]["nics"][0]["mac"] for info in listed}) == 20
    assert sorted(each.out.removeprefix("here is ").strip() for each in ran) == sorted(names())
    assert await disagreements(layout) == []

    gone = all_at_once(("rm", "--force", name, "--format", "json") for name in names())
    assert {each.code for each in gone} == {0}
    assert sorted(json.loads(each.out)[0]["name"] for each in gone) == sorted(info["vm"]["name"] for info in listed)
    assert names() == []
    assert await disagreements(layout) == []


def check_one_won(ended: Sequence[Ended], why: str) -> None:
    """One command succeeded, and each other one gave a single line that says why it did not."""
    assert sorted(each.code for each in ended) == [0] + [4] * (len(ended) - 1)
    for each in ended:
        if each.code:
            assert each.out == ""
            assert each.err.startswith("Error: ") and each.err.count("\n") == 1 and why in each.err


async def test_one_of_several_that_want_the_same_name_gets_it(layout: Layout, with_image: PutImage) -> None:
    await with_image("tiny")
    check_one_won(all_at_once([("create", *SMALL, "--name", "one")] * 6), "there is a VM 'one' already")
    assert names() == ["one"]
    others = [name.strip() for _, name, _ in all_at_once([("create", *SMALL)] * 4)]
    assert len({*others}) == 4
    check_one_won(all_at_once(("rename", name, "two") for name in others), "there is a VM 'two' already")
    assert sorted(names()) == sorted(["one", "two", *({*others} & {*names()})])
    assert len(names()) == 5
    assert await disagreements(layout) == []


async def test_one_of_several_that_want_the_same_port_gets_it(layout: Layout, with_image: PutImage) -> None:
    await with_image("tiny")
    wanted = f"{free_port()}:80"
    port, _, _ = wanted.partition(":")
    made = all_at_once(("create", *SMALL, "--name", f"v{number}", "-p", wanted) for number in range(6))
    check_one_won(made, f"port {port} is taken by '")
    (winner,) = names()
    assert all(f"by '{winner}'" in each.err for each in made if each.code)
    assert atoll("port", "rm", winner, port).code == 0

    assert {each.code for each in all_at_once(("create", *SMALL, "--name", f"w{number}") for number in range(4))} == {0}
    published = all_at_once(("port", "add", name, wanted) for name in names())
    losers = [each for each in published if each.code]
    assert len(losers) == len(published) - 1
    assert all(f"port {port} is taken by '" in each.err and each.err.count("\n") == 1 for each in losers)
    assert sum(f":{port}" in atoll("port", "ls", name).out for name in names()) == 1
    assert await disagreements(layout) == []


async def test_one_of_several_starts_of_a_vm_starts_it(layout: Layout, with_image: PutImage) -> None:
    await with_image("tiny")
    assert atoll("create", *SMALL, "--name", "v").code == 0
    started = all_at_once([("start", "v")] * 5)
    assert sorted(each.code for each in started) == [0, 5, 5, 5, 5]
    assert all("v: can't start: it is running" in each.err for each in started if each.code)
    assert await disagreements(layout) == []
    removed = all_at_once([("rm", "--force", "v")] * 5)
    assert {each.code for each in removed} <= {0, 3} and 0 in {each.code for each in removed}
    assert await disagreements(layout) == []


@pytest.mark.slow
async def test_a_thousand_vms_are_listed_found_and_removed(layout: Layout, with_image: PutImage) -> None:
    await with_image("tiny")
    await fill(1000)
    everyone = {f"many-{number}" for number in range(1000)}
    assert {*names()} == everyone
    in_json = json.loads(atoll("ls", "--format", "json").out)
    in_yaml = yaml.load(atoll("ls", "--format", "yaml").out, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert in_json == in_yaml
    assert {info["vm"]["name"] for info in in_json} == everyone
    header, *rows = atoll("ls").out.splitlines()
    assert header.split()[:2] == ["NAME", "STATE"]
    assert {tuple(row.split()[:2]) for row in rows} == {(name, "stopped") for name in everyone}

    chosen = next(info["vm"] for info in in_json if info["vm"]["name"] == "many-77")
    assert json.loads(atoll("show", "many-77", "--format", "json").out)["vm"] == chosen
    assert chosen["id"] in atoll("show", chosen["id"][:12]).out
    assert atoll("rename", "many-500", "single").code == 0
    assert atoll("show", "sing").out.split()[:2] == ["Name:", "single"]
    several = atoll("show", "many-9")
    assert several.code == 0 and several.out.split()[:2] == ["Name:", "many-9"], "an exact name is no prefix"
    several = atoll("show", "many-")
    assert several.code == 2
    assert "'many-' fits 999 VMs" in several.err

    assert atoll("start", "single").code == 0
    assert atoll("ls", "--quiet", "--state", "running").out == "single\n"
    assert atoll("rm", *(f"many-{number}" for number in range(100)), "nobody").code == 3
    assert atoll("rm", "--force", "single").code == 0
    assert {*names()} == everyone - {f"many-{number}" for number in range(100)} - {"many-500"}
    assert await disagreements(layout) == []
