"""QEMU's events as ours, and what the agent keeps of them over its own end."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.helpers.records import WEB

from atoll.agent.engine_events import BURST, EngineLogs, translated
from atoll.agent.state import Position, State
from atoll.layout import Layout
from atoll.model.vm import Vm
from atoll.operations.services import Services


def said(event: str, *, at: float = 5.0, **data: Any) -> dict[str, Any]:
    stamp = {"seconds": int(at), "microseconds": round(at % 1 * 1e6)}
    return {"timestamp": stamp, "event": event, "data": data}


@pytest.mark.parametrize(
    "message, kind, told",
    [
        (said("STOP"), "vm.halted", {}),
        (said("RESUME"), "vm.continued", {}),
        (said("RESET", guest=True, reason="guest-reset"), "vm.reset", {"guest": True, "reason": "guest-reset"}),
        (said("SHUTDOWN", guest=False, reason="host-qmp-quit"), "vm.shutdown",
         {"guest": False, "reason": "host-qmp-quit"}),
        (said("GUEST_PANICKED", action="pause"), "vm.panicked", {"action": "pause"}),
        (said("WATCHDOG", action="reset"), "vm.watchdog", {"action": "reset"}),
        (said("BLOCK_IO_ERROR", device="", operation="write", action="stop", nospace=True), "vm.disk-full",
         {"operation": "write", "action": "stop"}),
        (said("BLOCK_IO_ERROR", operation="read", action="report", nospace=False, reason="EIO"), "vm.io-error",
         {"operation": "read", "action": "report", "reason": "EIO"}),
    ],
)  # fmt: skip
def test_each_is_told_by_its_name(message: dict[str, Any], kind: str, told: dict[str, Any]) -> None:
    assert translated(message) == (kind, {"at": 5.0, **told})


def test_others_are_not_told() -> None:
    assert translated(said("VSERPORT_CHANGE", open=True)) is None
    assert translated({"return": {}}) is None


@pytest.fixture
def services(layout: Layout) -> Iterator[Services]:
    opened = Services(layout)
    opened.records.add_vm(WEB)
    yield opened
    opened.close()


def append(services: Services, vm: Vm, *messages: dict[str, Any]) -> None:
    log = services.layout.vm(vm.id).event_log
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write("".join(json.dumps(each) + "\n" for each in messages))


def kinds(services: Services) -> list[str]:
    return [event.kind for event in services.records.events()]


async def test_each_agent_goes_on_where_the_one_before_it_was(services: Services) -> None:
    path = services.layout.agent_state
    append(services, WEB, said("RESET", at=1.5))
    first = EngineLogs(services, State(path))
    first.follow(WEB)
    reading = asyncio.create_task(first.read())
    append(services, WEB, said("STOP", at=2.5))
    async with asyncio.timeout(5):
        while len(kinds(services)) < 2:
            await asyncio.sleep(0.01)
    reading.cancel()
    first.close()

    append(services, WEB, said("RESUME", at=3.5))
    # An agent that was killed between its record of an event and the note of its position.
    services.records.add_event("vm.continued", vm_id=WEB.id, name="web", data={"at": 3.5})
    append(services, WEB, said("RESET", at=4.5))
    second = EngineLogs(services, State(path))
    second.follow(WEB)
    second.close()
    assert kinds(services) == ["vm.reset", "vm.halted", "vm.continued", "vm.reset"]


async def test_a_new_run_is_read_from_its_beginning_and_the_old_to_its_end(services: Services) -> None:
    logs = EngineLogs(services, State(services.layout.agent_state))
    append(services, WEB, said("RESET"))
    logs.follow(WEB)
    append(services, WEB, said("SHUTDOWN", guest=True))
    log = services.layout.vm(WEB.id).event_log
    log.rename(log.with_name("events.jsonl.1"))
    append(services, WEB, said("RESUME"))
    assert WEB.run is not None
    logs.follow(replace(WEB, run=replace(WEB.run, pid=8)))
    logs.close()
    assert kinds(services) == ["vm.reset", "vm.shutdown", "vm.continued"]


async def test_a_guest_that_resets_itself_without_end_does_not_fill_the_records(services: Services) -> None:
    append(services, WEB, *(said("RESET", at=float(number)) for number in range(500)))
    logs = EngineLogs(services, State(services.layout.agent_state))
    logs.follow(WEB)
    logs.close()
    assert len(kinds(services)) == pytest.approx(BURST, abs=10)


def test_a_state_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    path.write_bytes(b"no database" * 1000)
    state = State(path)
    state.put_position("web", Position("run", 7, 9))
    assert state.position("web") == Position("run", 7, 9)
    state.forget_positions_but({"db"})
    assert state.position("web") is None
    state.close()


def test_an_agent_works_where_its_state_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "agent.db").mkdir()
    state = State(tmp_path / "agent.db")
    state.put_position("web", Position("run", 7, 9))
    assert state.position("web") == Position("run", 7, 9)
    state.close()
    assert (tmp_path / "agent.db").is_dir()
