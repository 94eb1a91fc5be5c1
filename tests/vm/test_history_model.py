"""Random sequences of everything that history can do, against a model of what each machine must contain."""

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tests.helpers import leftovers
from tests.helpers.images import adopt_cached
from tests.helpers.world import disagreements

import atoll
from atoll.layout import Layout
from atoll.operations.merge import merge
from atoll.operations.services import Services
from atoll.qemu.plan import layer_chain

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(1200)]

MOST_MACHINES = 4
WRITE = "echo {value} > /root/file; echo {value} > /tmp/file; sync"
READ = "cat /root/file; cat /tmp/file 2>/dev/null || echo none"


@dataclass(frozen=True)
class Content:
    """What a machine has on its disk and in its memory; None for a memory that a boot has cleared."""

    disk: int
    memory: int | None


@dataclass
class Head:
    content: Content
    state: str = "running"


class History(RuleBasedStateMachine):
    """`web` and what comes from it."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="atoll-test-"))
        self.layout = Layout(data=self.home / "data", cache=self.home / "cache", run=self.home / "run")
        asyncio.run(adopt_cached("tiny", self.layout))
        self.host = atoll.connect(self.layout).__enter__()
        # What is done in the background is done by the rule `merge` here.
        self.patches = [
            patch("atoll.operations.merge.begin"),
            patch("atoll.operations.merge.LONGEST", 2),
            patch("atoll.model.chain.LONGEST", 2),
            patch("atoll.model.chain.AFTER", 1),
        ]
        for each in self.patches:
            each.start()
        self.host.run("tiny", name="web", memory="96MiB", timeout=120)
        self.heads = {"web": Head(Content(0, None))}
        self.kept: dict[tuple[str, str], tuple[Content, bool]] = {}
        self.made = 0
        self._write("web", 1)

    def teardown(self) -> None:
        try:
            for info in self.host.ls():
                self.host.get(info.vm.id).rm(force=True)
            assert asyncio.run(disagreements(self.layout)) == []
            left = [path.name for path in self.layout.layers.iterdir()]
            assert len(left) == 1, f"only the image's layer stays, not {left}"
            assert not self.layout.memory.exists() or not list(self.layout.memory.iterdir())
        finally:
            for each in self.patches:
                each.stop()
            self.host.__exit__(None, None, None)
            leftovers.end_processes_of(self.home)
            shutil.rmtree(self.layout.templates, ignore_errors=True)
            shutil.rmtree(self.home, ignore_errors=True)

    # What the guests do

    def _sh(self, name: str, script: str) -> str:
        result = self.host.get(name).exec(["sh", "-c", script])
        assert result.exit_code == 0, result.stderr
        return result.text

    def _write(self, name: str, value: int) -> None:
        self._sh(name, WRITE.format(value=value))
        self.heads[name].content = Content(value, value)

    def _pick(self, data: st.DataObject, *states: str) -> str | None:
        fitting = sorted(name for name, head in self.heads.items() if head.state in states)
        return data.draw(st.sampled_from(fitting), label="machine") if fitting else None

    def _new_name(self, stem: str) -> str:
        self.made += 1
        return f"{stem}{self.made}"

    # What the user does

    @rule(data=st.data(), value=st.integers(2, 10**6))
    def write(self, data: st.DataObject, value: int) -> None:
        if name := self._pick(data, "running"):
            self._write(name, value)

    @rule(data=st.data(), disk_only=st.booleans())
    def snapshot(self, data: st.DataObject, disk_only: bool) -> None:
        if name := self._pick(data, "running", "stopped"):
            head, snapshot = self.heads[name], self._new_name("s")
            with_memory = head.state == "running" and not disk_only
            self.host.get(name).snapshot(snapshot, disk_only=disk_only)
            content = head.content if with_memory else replace(head.content, memory=None)
            self.kept[name, snapshot] = (content, with_memory)

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), keep=st.booleans())
    def restore(self, data: st.DataObject, keep: bool) -> None:
        name, snapshot = data.draw(st.sampled_from(sorted(self.kept)), label="snapshot")
        head = self.heads[name]
        before = {node.snapshot.name for node in self.host.get(name).history()}
        keep = keep and head.state != "suspended"
        self.host.get(name).restore(snapshot, keep=keep)
        if keep:
            (new,) = {node.snapshot.name for node in self.host.get(name).history()} - before
            running = head.state == "running"
            self.kept[name, new] = (head.content if running else replace(head.content, memory=None), running)
        content, with_memory = self.kept[name, snapshot]
        head.content = content
        if with_memory:
            head.state = "running"
        elif head.state == "running":
            self.host.get(name).wait("ready", timeout=120)
        else:
            head.state = "stopped"

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        name, snapshot = data.draw(st.sampled_from(sorted(self.kept)), label="snapshot")
        self.host.get(name).forget(snapshot)
        del self.kept[name, snapshot]

    @precondition(lambda self: len(self.heads) < MOST_MACHINES)
    @rule(data=st.data(), full=st.booleans())
    def clone(self, data: st.DataObject, full: bool) -> None:
        sources = [(name, "") for name, head in self.heads.items() if head.state in ("running", "stopped")]
        source = data.draw(st.sampled_from(sorted([*sources, *self.kept]) or [("", "")]), label="source")
        name, snapshot = source
        if not name:
            return
        content = self.kept[source][0] if snapshot else self.heads[name].content
        made = self.host.clone(f"{name}@{snapshot}" if snapshot else name, self._new_name("clone"), full=full)
        self.heads[made.name] = Head(replace(content, memory=None), "stopped")

    @precondition(lambda self: len(self.heads) < MOST_MACHINES)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        running = [(name, "") for name, head in self.heads.items() if head.state == "running"]
        with_memory = [key for key, (_, memory) in self.kept.items() if memory]
        if not running and not with_memory:
            return
        source = data.draw(st.sampled_from(sorted([*running, *with_memory])), label="source")
        name, snapshot = source
        content = self.kept[source][0] if snapshot else self.heads[name].content
        (made,) = self.host.fork(f"{name}@{snapshot}" if snapshot else name, name=self._new_name("fork"))
        self.heads[made.name] = Head(content)

    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        if name := self._pick(data, "running", "suspended"):
            self.host.get(name).stop(force=True)
            self.heads[name].state = "stopped"
            self.heads[name].content = replace(self.heads[name].content, memory=None)

    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        if name := self._pick(data, "stopped", "suspended"):
            self.host.get(name).start(wait=True, timeout=120)
            self.heads[name].state = "running"

    @rule(data=st.data())
    def suspend(self, data: st.DataObject) -> None:
        if name := self._pick(data, "running"):
            self.host.get(name).suspend()
            self.heads[name].state = "suspended"

    @rule()
    def merge(self) -> None:
        async def merged() -> None:
            services = Services(self.layout)
            try:
                await merge(services=services)
                layers = {layer.id: layer for layer in services.records.layers()}
                for vm in services.records.vms():
                    assert all(len(layer_chain(disk.layer, layers)) <= 2 for disk in vm.spec.disks)
            finally:
                services.close()

        asyncio.run(merged())

    @precondition(lambda self: len(self.heads) > 1)
    @rule(data=st.data())
    def rm(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.heads)), label="machine")
        self.host.get(name).rm(force=True)
        del self.heads[name]
        self.kept = {key: value for key, value in self.kept.items() if key[0] != name}

    @invariant()
    def each_machine_has_what_it_must(self) -> None:
        states = {info.vm.name: str(info.phase) for info in self.host.ls()}
        assert states == {name: head.state for name, head in self.heads.items()}
        for name, head in self.heads.items():
            if head.state == "running":
                memory = "none" if head.content.memory is None else head.content.memory
                assert self._sh(name, READ) == f"{head.content.disk}\n{memory}", name
        names = {(name, node.snapshot.name) for name in self.heads for node in self.host.get(name).history()}
        assert names == set(self.kept)
        assert asyncio.run(disagreements(self.layout)) == []


def test_each_head_has_what_the_model_says() -> None:
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=6,
            stateful_step_count=14,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
