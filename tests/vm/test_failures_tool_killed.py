"""The tool is killed at every step of every verb, on a real VM: the next command finishes or undoes it, tells so,
and what is recorded is what is there.
"""

import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers import tool
from tests.helpers.machines import Factory, Machine
from tests.helpers.ports import free_port
from tests.helpers.world import disagreements

from atoll.host import namespace
from atoll.model.requests import DiskRequest, NicSetRequest, SetRequest, ShareRequest
from atoll.model.spec import PortSpec
from atoll.model.state import Phase
from atoll.operations.engine import Context, Step, Verb
from atoll.operations.guest_agent import let_go
from atoll.operations.registry import VERBS
from atoll.operations.services import Services
from atoll.platform.local import LocalHost
from atoll.qemu.plan import layer_chain

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

MIB = 1024**2
SMALL: dict[str, Any] = {"memory": "96MiB"}


@dataclass
class Stage:
    """A home with a VM `v` in it, and what the case at hand wants to remember."""

    factory: Factory
    port: int

    async def vm(self) -> Machine:
        return self.factory.machine(await self.factory.host.get("v"))

    async def exists(self, name: str) -> bool:
        return any(info.vm.name == name for info in await self.factory.host.ls())

    async def phase(self) -> Phase:
        return await (await self.vm()).phase()


@dataclass
class Case:
    """How one verb is set up, what the tool does, and how its effect is seen."""

    prepare: Callable[[Stage], Awaitable[None]]
    action: str
    effect: Callable[[Stage], Awaitable[bool]]


async def stopped(stage: Stage) -> None:
    if not await stage.exists("v"):
        await stage.factory.create("tiny", name="v", **SMALL)
    await (await stage.vm()).stop(force=True)


async def running(stage: Stage) -> None:
    if not await stage.exists("v"):
        await stage.factory.create("tiny", name="v", **SMALL)
    vm = await stage.vm()
    if await vm.phase() is Phase.STOPPED:
        await vm.start(wait=True, timeout=120)
    await vm.resume()


async def paused(stage: Stage) -> None:
    await running(stage)
    await (await stage.vm()).pause()


async def nothing_made(stage: Stage) -> None:
    await stage.factory.image("tiny")
    for name in ("new", "v2"):
        if await stage.exists(name):
            await (await stage.factory.host.get(name)).rm(force=True)


async def called_v(stage: Stage) -> None:
    if await stage.exists("v2"):
        await (await stage.factory.host.get("v2")).rename("v")
    await stopped(stage)


async def whole_memory(stage: Stage) -> None:
    await running(stage)
    await (await stage.vm()).set(SetRequest(memory=96 * MIB))


async def no_ports(stage: Stage) -> None:
    await running(stage)
    vm = await stage.vm()
    for port in await vm.ports():
        await vm.unpublish(port.host_port)


async def one_port(stage: Stage) -> None:
    await no_ports(stage)
    await (await stage.vm()).publish(PortSpec(host_port=stage.port, guest_port=80))


async def no_extra_disk(stage: Stage) -> None:
    await running(stage)
    vm = await stage.vm()
    if any(disk.name == "extra" for disk in await vm.disks()):
        await vm.disk_rm("extra")


async def extra_disk(stage: Stage) -> None:
    await no_extra_disk(stage)
    await (await stage.vm()).disk_add(DiskRequest(name="extra", size="8MiB"))


async def no_image(stage: Stage) -> None:
    (stage.factory.folder / "blank.img").write_bytes(bytes(MIB))
    if any(image.name == "blank:latest" for image in await stage.factory.host.images.ls()):
        await stage.factory.host.images.rm("blank")


async def has_image(stage: Stage) -> bool:
    return any(image.name == "blank:latest" for image in await stage.factory.host.images.ls())


async def has_port(stage: Stage) -> bool:
    return any(port.host_port == stage.port for port in await (await stage.vm()).ports())


async def disk_size(stage: Stage, name: str) -> int:
    return next((disk.size for disk in await (await stage.vm()).disks() if disk.name == name), 0)


async def memory(stage: Stage) -> int:
    record = (await stage.vm()).record
    return (record.pending or record.spec).memory


def _is(phase: Phase) -> Callable[[Stage], Awaitable[bool]]:
    async def check(stage: Stage) -> bool:
        return await stage.phase() is phase

    return check


async def _gone(stage: Stage) -> bool:
    return not await stage.exists("v")


async def no_snapshots(stage: Stage) -> None:
    await running(stage)
    vm = await stage.vm()
    for node in await vm.history():
        await vm.forget(node.snapshot.name)
    await vm.sh("echo kept > /root/file; sync")


async def one_snapshot(stage: Stage) -> None:
    """The VM has gone on since its only snapshot."""
    await no_snapshots(stage)
    vm = await stage.vm()
    await vm.snapshot("s")
    await vm.sh("echo changed > /root/file; sync")


async def has_snapshot(stage: Stage) -> bool:
    vm = await stage.vm()
    assert await vm.read("/root/file") == "kept", "the guest's data are there, and it runs"
    return [node.snapshot.name for node in await vm.history()] == ["s"]


async def is_restored(stage: Stage) -> bool:
    return await (await stage.vm()).read("/root/file") == "kept"


async def cut_or_not(stage: Stage) -> bool:
    """A cut changes nothing that the guest could see."""
    assert await (await stage.vm()).read("/root/file") == "kept"
    return False


async def woken(stage: Stage) -> None:
    await running(stage)
    await (await stage.vm()).sh("echo kept > /tmp/in-memory")


async def is_suspended(stage: Stage) -> bool:
    if await stage.phase() is Phase.SUSPENDED:
        return True
    assert await (await stage.vm()).read("/tmp/in-memory") == "kept"
    return False


async def one_waits(stage: Stage) -> None:
    """Nothing but a VM with a snapshot, and a copy that waits."""
    await one_snapshot(stage)
    if await stage.exists("taken"):
        await (await stage.factory.host.get("taken")).rm(force=True)
    for pool in await stage.factory.host.pools.ls():
        await stage.factory.host.pools.rm(pool.snapshot_id)
    await stage.factory.host.pools.fill("v@s", 1)


async def is_taken(stage: Stage) -> bool:
    if not await stage.exists("taken"):
        return False
    taken = stage.factory.machine(await stage.factory.host.get("taken"))
    assert await taken.read("/root/file") == "kept"
    return True


MERGE_SHORT_CHAINS = """
from atoll.model import chain
from atoll.operations import merge
merge.LONGEST = chain.LONGEST = 2
chain.AFTER = 1
await merge.merge(services=host._services)
"""


async def long_chain(stage: Stage) -> None:
    await running(stage)
    while await is_short(stage):
        vm = await stage.vm()
        await vm.sh("date > /root/file; sync")
        await vm.snapshot("layer", disk_only=True)
        await vm.forget("layer")


async def is_short(stage: Stage) -> bool:
    layers = {layer.id: layer for layer in stage.factory.host._services.records.layers()}
    return len(layer_chain((await stage.vm()).record.spec.disks[0].layer, layers)) <= 2


async def no_backups(stage: Stage) -> None:
    await no_snapshots(stage)
    shutil.rmtree(stage.factory.folder / "backups", ignore_errors=True)


async def is_backed_up(stage: Stage) -> bool:
    assert await (await stage.vm()).read("/root/file") == "kept"
    folder = stage.factory.folder / "backups"
    if not (folder / "atoll-backup.json").exists():
        return False
    assert (await stage.factory.host.backups.verify(folder)).damages == ()
    return bool(await stage.factory.host.backups.ls(folder))


async def one_backup(stage: Stage) -> None:
    """Of a VM that has gone since, and with it the layers that are to come."""
    folder = stage.factory.folder / "backups"
    if not folder.exists():
        await no_snapshots(stage)
        vm = await stage.vm()
        await vm.backup(folder)
        await vm.rm(force=True)
    if await stage.exists("new"):
        await (await stage.factory.host.get("new")).rm(force=True)


async def no_bundle(stage: Stage) -> None:
    await stopped(stage)
    (stage.factory.folder / "bundle").unlink(missing_ok=True)


async def has_bundle(stage: Stage) -> bool:
    assert not list(stage.factory.folder.glob(".atoll-export-*"))
    return (stage.factory.folder / "bundle").exists()


async def a_bundle(stage: Stage) -> None:
    """One that needs nothing of what is here, but for a layer."""
    if await stage.exists("new"):
        await (await stage.factory.host.get("new")).rm(force=True)
    if not await has_bundle(stage):
        await running(stage)
        await (await stage.vm()).snapshot("s")
        await (await stage.vm()).export(stage.factory.folder / "bundle", snapshot="s")
        await (await stage.vm()).rm(force=True)


async def is_imported(stage: Stage) -> bool:
    if not await stage.exists("new"):
        assert not list(stage.factory.layout.memory.iterdir())
        return False
    new = stage.factory.machine(await stage.factory.host.get("new"))
    await new.restore("s")
    return await new.phase() is Phase.RUNNING


async def no_network(stage: Stage) -> None:
    await stage.factory.image("tiny")
    for each in await stage.factory.host.networks.ls():
        await stage.factory.host.networks.rm(each.network.name, force=True)


async def network_that_is_up(stage: Stage) -> None:
    """Somebody was on it."""
    networks = stage.factory.host.networks
    if await has_network(stage):
        return
    await networks.create("lab")
    await running(stage)
    await (await stage.vm()).net_attach("lab")
    await (await stage.vm()).net_detach("lab")
    assert (await networks.show("lab")).up


async def has_network(stage: Stage) -> bool:
    return any(each.network.name == "lab" for each in await stage.factory.host.networks.ls())


async def detached(stage: Stage) -> None:
    await running(stage)
    if not await has_network(stage):
        await stage.factory.host.networks.create("lab")
    if await is_attached(stage):
        await (await stage.vm()).net_detach("lab")


async def attached(stage: Stage) -> None:
    await detached(stage)
    await (await stage.vm()).net_attach("lab")


async def attached_without_groups(stage: Stage) -> None:
    if not await has_network(stage) or not await is_attached(stage):
        await attached(stage)
    if not await has_group(stage):
        await stage.factory.host.networks.groups.create("web", ["allow in tcp 80"])
    if await is_ruled(stage):
        await (await stage.vm()).net_set(NicSetRequest(groups=()))


async def is_ruled(stage: Stage) -> bool:
    """The record says so, and so do the filters in its network."""
    (card,) = (await stage.factory.host.networks.show("lab")).attached
    network = await stage.factory.host.networks.show("lab")
    holder = namespace.holder_of(stage.factory.layout.network(network.network.id))
    assert holder is not None
    told = await namespace.run(holder.pid, "nft", "list", "ruleset")
    assert (b"goto pass_in_" in told.stdout) is bool(card.groups)
    return bool(card.groups)


async def no_group(stage: Stage) -> None:
    await stage.factory.image("tiny")
    if await has_group(stage):
        await stage.factory.host.networks.groups.rm("web")


async def a_group(stage: Stage) -> None:
    await stage.factory.image("tiny")
    if not await has_group(stage):
        await stage.factory.host.networks.groups.create("web")
    await stage.factory.host.networks.groups.set("web", ["allow in tcp 80"])


async def has_group(stage: Stage) -> bool:
    return bool(await stage.factory.host.networks.groups.ls())


async def has_other_rules(stage: Stage) -> bool:
    return (await stage.factory.host.networks.groups.show("web")).rules == ("deny in any from any",)


async def is_shared(stage: Stage) -> bool:
    return bool(await (await stage.vm()).shares())


async def nothing_shared(stage: Stage) -> None:
    await running(stage)
    if await is_shared(stage):
        await (await stage.vm()).share_rm("/mnt/s")


async def something_shared(stage: Stage) -> None:
    await running(stage)
    request = ShareRequest(host_path=str(stage.factory.folder), guest_path="/mnt/s")
    vm = await stage.vm()
    assert (await vm.share_add(request)).state == "shared"
    # The tool that is killed wants the agent, and nobody here hears that it does.
    await let_go(stage.factory.layout.vm(vm.id))


async def is_attached(stage: Stage) -> bool:
    """It is recorded; that the machine has it too is seen for each verb."""
    return any((await stage.factory.host.networks.show("lab")).attached)


CASES: dict[str, Case] = {
    "create": Case(nothing_made, "await host.create('tiny', name='new', memory='96MiB')", lambda s: s.exists("new")),
    "start": Case(stopped, "await (await host.get('v')).start()", _is(Phase.RUNNING)),
    "stop": Case(running, "await (await host.get('v')).stop(force=True)", _is(Phase.STOPPED)),
    "pause": Case(running, "await (await host.get('v')).pause()", _is(Phase.PAUSED)),
    "resume": Case(paused, "await (await host.get('v')).resume()", _is(Phase.RUNNING)),
    "rm": Case(stopped, "await (await host.get('v')).rm()", _gone),
    "rename": Case(called_v, "await (await host.get('v')).rename('v2')", lambda s: s.exists("v2")),
    "set": Case(
        whole_memory,
        "await (await host.get('v')).set(SetRequest(memory='80MiB' if {number} % 2 else '88MiB'))",
        lambda s: _memory_is_set(s),
    ),
    "port add": Case(
        no_ports, "await (await host.get('v')).publish(PortSpec(host_port={port}, guest_port=80))", has_port
    ),
    "port rm": Case(one_port, "await (await host.get('v')).unpublish({port})", lambda s: _not(has_port(s))),
    "disk add": Case(
        no_extra_disk,
        "await (await host.get('v')).disk_add(DiskRequest(name='extra', size='8MiB'))",
        lambda s: _more(disk_size(s, "extra"), 0),
    ),
    "disk rm": Case(
        extra_disk, "await (await host.get('v')).disk_rm('extra')", lambda s: _not(_more(disk_size(s, "extra"), 0))
    ),
    "disk resize": Case(
        extra_disk,
        "await (await host.get('v')).disk_resize('extra', '16MiB')",
        lambda s: _more(disk_size(s, "extra"), 8 * MIB),
    ),
    "snapshot": Case(no_snapshots, "await (await host.get('v')).snapshot('s')", has_snapshot),
    "restore": Case(one_snapshot, "await (await host.get('v')).restore('s')", is_restored),
    "cut": Case(no_snapshots, "await (await host.get('v')).clone('copy')", cut_or_not),
    "suspend": Case(woken, "await (await host.get('v')).suspend()", is_suspended),
    "take": Case(one_waits, "await host.pools.take('v@s', 'taken')", is_taken),
    "merge": Case(long_chain, MERGE_SHORT_CHAINS, is_short),
    "backup": Case(no_backups, "await (await host.get('v')).backup({backups!r})", is_backed_up),
    "restore backup": Case(
        one_backup, "await host.backups.restore({backups!r}, 'v', 'new')", lambda s: s.exists("new")
    ),
    "export": Case(no_bundle, "await (await host.get('v')).export({bundle!r})", has_bundle),
    "import": Case(a_bundle, "await host.import_bundle({bundle!r}, 'new')", is_imported),
    "share add": Case(
        nothing_shared,
        "await (await host.get('v')).share_add(ShareRequest(host_path={folder!r}, guest_path='/mnt/s'))",
        is_shared,
    ),
    "share rm": Case(something_shared, "await (await host.get('v')).share_rm('/mnt/s')", lambda s: _not(is_shared(s))),
    "net create": Case(no_network, "await host.networks.create('lab')", has_network),
    "net rm": Case(network_that_is_up, "await host.networks.rm('lab')", lambda s: _not(has_network(s))),
    "net attach": Case(detached, "await (await host.get('v')).net_attach('lab')", is_attached),
    "net detach": Case(attached, "await (await host.get('v')).net_detach('lab')", lambda s: _not(is_attached(s))),
    "net set": Case(
        attached_without_groups, "await (await host.get('v')).net_set(NicSetRequest(groups=('web',)))", is_ruled
    ),
    "net group create": Case(no_group, "await host.networks.groups.create('web')", has_group),
    "net group set": Case(a_group, "await host.networks.groups.set('web', ['deny in any'])", has_other_rules),
    "net group rm": Case(a_group, "await host.networks.groups.rm('web')", lambda s: _not(has_group(s))),
    "image": Case(
        no_image, "await host.images.import_file(ImportRequest(path={blank!r}, name='blank', format='raw'))", has_image
    ),
}


OF_EACH_KIND = {
    *("create", "start", "stop", "rm", "set", "disk add"),
    *("snapshot", "restore", "take", "merge", "import", "net attach", "share add"),
}
"""The others are tried with --all."""


async def _memory_is_set(stage: Stage) -> bool:
    return await memory(stage) < 96 * MIB


async def _not(answer: Awaitable[bool]) -> bool:
    return not await answer


async def _more(answer: Awaitable[int], than: int) -> bool:
    return await answer > than


@pytest.fixture
async def stage(factory: Factory) -> Stage:
    return Stage(factory, free_port())


def action_of(case: Case, stage: Stage, number: int = 0) -> str:
    blank, bundle, backups = (str(stage.factory.folder / name) for name in ("blank.img", "bundle", "backups"))
    return case.action.format(
        port=stage.port, number=number, blank=blank, bundle=bundle, backups=backups, folder=str(stage.factory.folder)
    )


async def settled(factory: Factory) -> list[str]:
    """What the next command tells about what was left."""
    async with LocalHost(factory.layout) as host:
        return host.notices()


def kinds_of_end(verb: Verb[Any], upto: str) -> set[str]:
    """How an operation that had begun the step `upto` may be told to have ended."""
    begun = verb.steps[: 1 + next(number for number, step in enumerate(verb.steps) if step.name == upto)]
    if any(step.final for step in begun):
        return {"it was finished."}
    return {"it was undone."} if any(step.undo for step in begun) else {"there was nothing to undo."}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OF_EACH_KIND else pytest.mark.slow) for name in sorted(VERBS)]
)
async def test_a_verb_killed_at_any_step_is_finished_or_undone_and_told(name: str, stage: Stage) -> None:
    case, verb = CASES[name], VERBS[name]
    for number, step in enumerate(verb.steps):
        for moment in ("before", "after"):
            where = f"{name}: killed {moment} '{step.name}'"
            await case.prepare(stage)
            assert not await case.effect(stage), where
            exit_code, said = tool.run(
                stage.factory.layout, action_of(case, stage, number), kill_at=(name, step.name, moment)
            )
            assert exit_code == -9, f"{where}: {said}"
            (told,) = await settled(stage.factory)
            assert told.startswith(f"'{name} ") and "had been interrupted" in told, where
            (ending,) = kinds_of_end(verb, step.name)
            assert told.endswith(ending), where
            assert await disagreements(stage.factory.layout) == [], where
            if ending != "there was nothing to undo.":
                assert await case.effect(stage) is (ending == "it was finished."), where
            assert await settled(stage.factory) == [], where


def last_that_can_be_undone(verb: Verb[Any]) -> Step[Any] | None:
    """The step before the point of no return, or the last one."""
    reversible = []
    for step in verb.steps:
        if step.final:
            break
        reversible.append(step)
    return reversible[-1] if any(step.undo for step in reversible) else None


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name, verb in VERBS.items() if last_that_can_be_undone(verb)))
async def test_a_verb_killed_while_it_is_undone_is_undone_and_each_undo_may_run_again(name: str, stage: Stage) -> None:
    case, verb = CASES[name], VERBS[name]
    failing = last_that_can_be_undone(verb)
    assert failing is not None
    for step in verb.steps[: verb.steps.index(failing) + 1]:
        where = f"{name}: killed at the undo of '{step.name}'"
        await case.prepare(stage)
        exit_code, said = tool.run(
            stage.factory.layout,
            action_of(case, stage),
            kill_at=(name, step.name, "undo"),
            fail_at=(name, failing.name, "after"),
        )
        assert exit_code == -9, f"{where}: {said}"
        (told,) = await settled(stage.factory)
        assert told.endswith("it was undone."), where
        assert await disagreements(stage.factory.layout) == [], where
        await undo_again(stage.factory, verb)
        assert await disagreements(stage.factory.layout) == [], f"{where}, and undone once more"
        assert not await case.effect(stage), where


async def undo_again(factory: Factory, verb: Verb[Any]) -> None:
    services = Services(factory.layout)
    try:
        operation = next(o for o in services.records.operations() if o.verb == verb.name)
        context: Context[Any] = Context(
            services=services,
            subject=operation.subject,
            request=msgspec.convert(operation.request, verb.request),
            report=lambda progress: None,
            notes=dict(operation.notes),
        )
        for step in reversed(verb.steps):
            if step.undo is not None:
                await step.undo(context)
    finally:
        services.close()


def test_each_verb_of_the_registry_has_its_case() -> None:
    assert set(CASES) == set(VERBS)
    assert Path(tool.ROOT / "src").is_dir()
