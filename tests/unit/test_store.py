"""Records in real SQLite files: upgrades, clashes, what moves and what is forgotten.

Each schema version has a dump of a database that was made at it: golden/records-N.sql. After a new migration make the
next one with `ATOLL_UPDATE_GOLDEN=1 .venv/bin/pytest tests/unit/test_store.py`; those of shipped versions stay.
"""

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers.records import (
    IMAGE,
    LAYER,
    OPERATION,
    SNAPSHOT,
    WEB,
    image,
    opened,
    operation,
    put_everything,
    sql,
    vm,
)

from atoll.errors import AlreadyExists, NotFound, RecordsFailed
from atoll.model.operation import StepRecord
from atoll.model.spec import PortSpec
from atoll.model.vm import Event
from atoll.store import database, sqlite
from atoll.store.schema import MIGRATIONS
from atoll.store.sqlite import SqliteRecords

GOLDEN = Path(__file__).parent / "golden"
NEWEST = len(MIGRATIONS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "atoll.db"


@pytest.fixture
def records(path: Path) -> Iterator[SqliteRecords]:
    with opened(path) as records:
        yield records


# The schema


def everything(records: SqliteRecords) -> tuple[object, ...]:
    events = [(event.kind, event.vm_id, event.name, event.data) for event in records.events()]
    return records.vms(), records.images(), records.layers(), records.operations(), events


def dump_of_now(path: Path) -> str:
    """SQL that makes a database of the newest schema, with its JSON as text."""
    with opened(path) as records:
        put_everything(records)
    with contextlib.closing(sqlite3.connect(path)) as db:
        lines = [f"PRAGMA user_version = {NEWEST};", *db.iterdump()]
    dump = "\n".join(lines) + "\n"

    def as_text(match: re.Match[str]) -> str:
        text = bytes.fromhex(match[1]).decode().replace("'", "''")
        return f"CAST('{text}' AS BLOB)"

    return re.sub(r"X'([0-9A-F]*)'", as_text, dump)


@pytest.mark.parametrize("version", range(1, NEWEST + 1))
def test_a_database_of_each_earlier_version_is_upgraded_with_its_data(path: Path, version: int) -> None:
    dump = GOLDEN / f"records-{version}.sql"
    if os.environ.get("ATOLL_UPDATE_GOLDEN") and version == NEWEST and not dump.exists():
        dump.write_text(dump_of_now(path.with_name("new.db")))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(dump.read_text())
    with opened(path) as records:
        assert everything(records) == (
            [WEB], [IMAGE], [LAYER], [OPERATION],
            [("vm.created", WEB.id, "web", {"image": "debian:13"})],
        )  # fmt: skip
        assert records.snapshots() == ([SNAPSHOT] if version >= 3 else [])
        with pytest.raises(AlreadyExists, match="port 8080 is taken by 'web'"):
            records.add_vm(vm("other", 8080))
        assert [found.name for found in records.throwaways()] == ["web"]
    assert sql(path, "PRAGMA user_version") == [(NEWEST,)]


def test_the_next_migration_runs_once_on_data_that_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as records:
        put_everything(records)
        before = everything(records)
    column = "ALTER TABLE layers ADD COLUMN seen INTEGER NOT NULL DEFAULT 7; CREATE INDEX by_seen ON layers(seen);"
    monkeypatch.setattr(database, "MIGRATIONS", (*MIGRATIONS, column))
    for _ in range(2):
        with opened(path) as records:
            assert everything(records) == before
    assert sql(path, "SELECT seen FROM layers") == [(7,)]
    assert sql(path, "PRAGMA user_version") == [(NEWEST + 1,)]


def test_a_migration_that_fails_half_way_leaves_the_database_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as records:
        put_everything(records)
    schema = sql(path, "SELECT sql FROM sqlite_schema")
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE more (id TEXT); DROP TABLE absent;"))
        with pytest.raises(RecordsFailed, match="no such table: absent"):
            SqliteRecords(path)
    assert sql(path, "SELECT sql FROM sqlite_schema") == schema
    with opened(path) as records:
        assert records.vms() == [WEB]


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_a_newer_schema_is_refused_and_not_touched(path: Path, journal: str) -> None:
    with opened(path) as records:
        records.add_vm(WEB)
    sql(path, f"PRAGMA user_version = {NEWEST + 1}")
    sql(path, f"PRAGMA journal_mode = {journal}")
    content = path.read_bytes()
    for _ in range(2):
        with pytest.raises(RecordsFailed, match="is of a newer Atoll") as refused:
            SqliteRecords(path)
    assert f"number {NEWEST + 1}" in refused.value.why
    assert "Upgrade" in refused.value.next_step
    assert path.read_bytes() == content
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# Names and ports


def test_a_name_has_one_holder_until_it_is_let_go(records: SqliteRecords) -> None:
    records.add_vm(vm("web"))
    with pytest.raises(AlreadyExists, match="there is a VM 'web' already") as refused:
        records.add_vm(replace(vm("web"), id="another"))
    assert "atoll rm web" in refused.value.next_step
    records.add_vm(vm("api"))
    with pytest.raises(AlreadyExists, match="there is a VM 'web' already"):
        records.put_vm(replace(vm("api"), name="web"))
    assert records.vm("api") == vm("api")
    records.put_vm(replace(vm("web"), name="front"))
    records.put_vm(replace(vm("api"), name="web"))
    assert {found.name for found in records.vms()} == {"front", "web"}


EVERYWHERE = PortSpec(host_address="0.0.0.0", host_port=80, guest_port=80)
HERE = PortSpec(host_address="127.0.0.1", host_port=80, guest_port=8080)
THERE = PortSpec(host_address="127.0.0.2", host_port=80, guest_port=80)
UDP = PortSpec(host_address="0.0.0.0", host_port=80, guest_port=80, protocol="udp")


@pytest.mark.parametrize(
    ("held", "wanted"), [(HERE, HERE), (EVERYWHERE, HERE), (HERE, EVERYWHERE), (EVERYWHERE, EVERYWHERE)]
)
@pytest.mark.parametrize("how", ["add_vm", "put_vm"])
def test_ports_clash_and_the_holder_is_named(
    records: SqliteRecords, held: PortSpec, wanted: PortSpec, how: str
) -> None:
    records.add_vm(vm("web", held))
    if how == "put_vm":
        records.add_vm(vm("api", 81))
    with pytest.raises(AlreadyExists, match="api: port 80 is taken by 'web'") as refused:
        getattr(records, how)(vm("api", 82, wanted))
    assert "atoll port rm web 80" in refused.value.next_step
    # Nothing of it was kept: neither the VM, nor the port that came before the clash; and what it had, it has.
    assert records.vm("api") == (vm("api", 81) if how == "put_vm" else None)
    records.add_vm(vm("third", 82))
    if how == "put_vm":
        with pytest.raises(AlreadyExists, match="port 81 is taken by 'api'"):
            records.add_vm(vm("fourth", 81))


@pytest.mark.parametrize(("one", "other"), [(HERE, THERE), (HERE, UDP), (EVERYWHERE, UDP)])
def test_ports_of_other_addresses_and_protocols_go_together(
    records: SqliteRecords, one: PortSpec, other: PortSpec
) -> None:
    records.add_vm(vm("web", one))
    records.add_vm(vm("api", other))
    records.add_vm(vm("both", replace(one, host_port=90), replace(other, host_port=90)))
    assert len(records.vms()) == 3


@pytest.mark.parametrize("second", [HERE, EVERYWHERE])
def test_a_port_that_one_vm_publishes_twice_is_told_as_that(records: SqliteRecords, second: PortSpec) -> None:
    with pytest.raises(AlreadyExists, match="web: port 80 is published twice"):
        records.add_vm(vm("web", HERE, second))
    assert records.vms() == []


def test_ports_go_with_their_vm_and_with_a_change(records: SqliteRecords) -> None:
    records.add_vm(vm("web", 80, 81))
    records.put_vm(vm("web", 80))
    records.add_vm(vm("api", 81))
    records.remove_vm("web")
    records.remove_vm("web")
    records.add_vm(vm("new", 80))
    assert records.vm("web") is None


def test_a_vm_that_is_gone_can_not_be_changed(records: SqliteRecords) -> None:
    with pytest.raises(NotFound, match="the VM 'web' is gone"):
        records.put_vm(vm("web", 80))
    records.add_vm(vm("api", 80))


def test_whether_a_vm_is_thrown_away_can_change(records: SqliteRecords) -> None:
    records.add_vm(vm("web"))
    assert records.throwaways() == []
    records.put_vm(replace(vm("web"), remove_when_stopped=True))
    assert [found.name for found in records.throwaways()] == ["web"]
    records.put_vm(vm("web"))
    assert records.throwaways() == []


def test_vms_come_oldest_first(records: SqliteRecords) -> None:
    for name, at in (("c", 2.0), ("a", 3.0), ("b", 1.0)):
        records.add_vm(replace(vm(name), created_at=at))
    assert [found.name for found in records.vms()] == ["b", "c", "a"]


# Images


def names_of(records: SqliteRecords) -> dict[str, tuple[str, ...]]:
    return {found.id: (found.name, *found.tags) for found in records.images()}


def test_image_names_move_to_the_image_that_comes_later(records: SqliteRecords) -> None:
    records.add_image(image("old", "web:v1", "web:latest"), [])
    records.add_image(image("new", "web:latest"), [])
    assert names_of(records) == {"id-old": ("old", "web:v1"), "id-new": ("new", "web:latest")}


def test_image_names_move_when_they_are_given_to_another(records: SqliteRecords) -> None:
    records.add_image(image("one", "stable"), [])
    records.add_image(image("two"), [])
    assert records.put_image_names("id-two", ["two", "stable"]).tags == ("stable",)
    assert names_of(records) == {"id-one": ("one",), "id-two": ("two", "stable")}
    records.put_image_names("id-two", ["two"])
    records.put_image_names("id-one", ["stable"])
    assert names_of(records) == {"id-one": ("stable",), "id-two": ("two",)}


def test_an_image_whose_last_name_moved_is_shown_by_its_id(records: SqliteRecords) -> None:
    records.add_image(replace(image("tiny"), id="0123456789abcdef"), [])
    records.add_image(image("tiny"), [])
    assert names_of(records) == {"0123456789abcdef": ("0123456789ab",), "id-tiny": ("tiny",)}


def test_names_of_an_image_that_is_gone_are_free(records: SqliteRecords) -> None:
    records.add_image(image("one", "web:v1"), [])
    records.remove_image("id-one")
    records.remove_image("id-one")
    records.add_image(image("two", "web:v1"), [])
    assert names_of(records) == {"id-two": ("two", "web:v1")}
    with pytest.raises(NotFound, match="there is no image 'id-one'"):
        records.put_image_names("id-one", ["web:v1"])
    assert names_of(records) == {"id-two": ("two", "web:v1")}


def test_layers_stay_until_they_are_removed_themselves(records: SqliteRecords) -> None:
    records.add_image(IMAGE, [LAYER])
    records.remove_image(IMAGE.id)
    assert records.layers() == [LAYER]
    records.remove_layers(["base", "never there"])
    assert records.layer("base") is None


# The journal and the events


def test_a_cancel_request_survives_what_the_owner_writes_later(records: SqliteRecords, path: Path) -> None:
    running = operation(1, "running")
    records.put_operation(running)
    with opened(path) as other:
        other.request_cancel(running.id)
    records.put_operation(replace(running, steps=(StepRecord(name="next", state="intended"),)))
    found = records.operation(running.id)
    assert found is not None
    assert found.cancel_requested
    assert [step.name for step in found.steps] == ["next"]
    with pytest.raises(NotFound, match="there is no operation 'unheard'"):
        records.request_cancel("unheard")


def test_unfinished_operations_are_found_newest_first(records: SqliteRecords) -> None:
    for number, state in enumerate(("running", "done", "undoing", "undone", "stuck")):
        records.put_operation(operation(number, state))
    assert [found.state for found in records.operations(unfinished=True)] == ["stuck", "undoing", "running"]
    assert [found.created_at for found in records.operations(limit=2)] == [4.0, 3.0]


def test_old_operations_are_forgotten_but_never_unfinished_ones(
    records: SqliteRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "KEPT_OPERATIONS", 5)
    for number, state in enumerate(("running", "undoing", "stuck", "done", "undone")):
        records.put_operation(operation(number, state))
    for number in range(5, 20):
        records.put_operation(operation(number))
    found = {int(found.created_at): found.state for found in records.operations()}
    assert {number: found.pop(number) for number in range(3)} == {0: "running", 1: "undoing", 2: "stuck"}
    assert found == dict.fromkeys(range(15, 20), "done")
    # An old one that ends at last is forgotten with the next that begins.
    records.put_operation(operation(0, "done"))
    records.put_operation(operation(20))
    assert {int(found.created_at) for found in records.operations()} == {1, 2, *range(16, 21)}


def test_old_events_are_forgotten_and_numbers_never_used_again(
    records: SqliteRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "KEPT_EVENTS", 3)
    assert records.last_event() == 0
    for number in range(10):
        assert records.add_event("tick", data={"n": number}).id == number + 1
    assert [(event.id, event.data["n"]) for event in records.events()] == [(8, 7), (9, 8), (10, 9)]
    assert [event.id for event in records.events(after=8, limit=1)] == [9]
    assert records.events(after=10) == []
    assert records.last_event() == 10


def test_an_event_is_read_as_it_was_added_and_wakes_its_followers(path: Path, tmp_path: Path) -> None:
    wake = tmp_path / "run/wake"
    with contextlib.closing(SqliteRecords(path, wake=wake)) as records:
        added = records.add_event("vm.started", vm_id="x", name="größe", data={"pid": 7, "why": None})
        assert records.events() == [added]
        assert isinstance(added, Event)
        changed = wake.stat().st_mtime_ns
        records.put_operation(operation(1, "running"))
        records.request_cancel(operation(1).id)
        assert wake.stat().st_mtime_ns > changed


def test_vms_are_those_of_now_whoever_wrote_last(tmp_path: Path) -> None:
    ours, theirs = SqliteRecords(tmp_path / "atoll.db"), SqliteRecords(tmp_path / "atoll.db")
    first, second = vm("one"), vm("two")
    ours.add_vm(first)
    assert ours.vms() == [first] == theirs.vms()
    theirs.add_vm(second)
    assert {each.name for each in ours.vms()} == {"one", "two"}
    ours.put_vm(replace(first, name="uno"))
    assert {each.name for each in ours.vms()} == {"uno", "two"} == {each.name for each in theirs.vms()}
    kept = {each.id: each for each in ours.vms()}
    theirs.put_vm(replace(second, name="due"))
    assert next(each for each in ours.vms() if each.id == first.id) is kept[first.id]
    assert {each.name for each in ours.vms()} == {"uno", "due"}
    ours.vms().clear()
    assert len(ours.vms()) == 2
    with pytest.raises(RuntimeError), ours._transaction() as db:
        db.execute("DELETE FROM vms")
        assert ours.vms() == []
        raise RuntimeError
    assert len(ours.vms()) == 2
    theirs.remove_vm(second.id)
    assert [each.name for each in ours.vms()] == ["uno"]
    assert ours.called("uno") == ours.called(first.id) == replace(first, name="uno")
    assert ours.called("un") is None
    ours.close()
    theirs.close()
