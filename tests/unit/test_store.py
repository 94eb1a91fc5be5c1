"""Records in real SQLite files: upgrades, clashes, several processes at once, and files that are damaged.

Each schema version has a dump of a database that was made at it: golden/records-N.sql. After a new migration make the
next one with `ATOLL_UPDATE_GOLDEN=1 .venv/bin/pytest tests/unit/test_store.py`; those of shipped versions stay.
"""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers.tool import ROOT

from atoll.errors import AlreadyExists, NotFound, RecordsFailed
from atoll.model.image import Image, ImageDisk, Layer
from atoll.model.operation import Operation, Owner, StepRecord
from atoll.model.spec import BootSpec, CpuSpec, DiskSpec, GuestSpec, NicSpec, PortSpec, SeedSpec, VmSpec
from atoll.model.units import GIB
from atoll.model.vm import Event, Exit, Run, Vm
from atoll.store import sqlite
from atoll.store.schema import MIGRATIONS
from atoll.store.sqlite import SqliteRecords

GOLDEN = Path(__file__).parent / "golden"
NEWEST = len(MIGRATIONS)

LAYER = Layer(id="base", virtual_size=GIB, file_size=4096, sha256="d" * 64)
IMAGE = Image(
    id="1" * 32,
    name="debian:13",
    arch="x86_64",
    created_at=1000.5,
    source="build",
    sha256="e" * 64,
    disks=(ImageDisk(name="root", size=GIB, layer="base"),),
    firmwares=("kernel", "uefi"),
    firmware="kernel",
    kernel="a" * 64,
    cmdline="quiet",
    guest=GuestSpec(agent=True, seed="nocloud"),
    tags=("debian:latest",),
    labels={"recipe": "debian:13"},
)
SPEC = VmSpec(
    machine_type="pc-q35-10.0",
    cpu=CpuSpec(count=2, maximum=4),
    boot=BootSpec(firmware="kernel", kernel="a" * 64, cmdline="quiet"),
    disks=(DiskSpec(name="root", size=GIB, layer="base"), DiskSpec(name="cd0", size=1, blob="f" * 64, media="cdrom")),
    nics=(NicSpec(name="net0", mac="52:54:00:00:00:01", ports=(PortSpec(host_port=8080, guest_port=80),)),),
    seed=SeedSpec(user="me", ssh_keys=("ssh-ed25519 AAAA",)),
    addresses={"disk-root": "0x3"},
)
WEB = Vm(
    id="2" * 32,
    name="web",
    image="debian:13",
    created_at=2000.25,
    spec=SPEC,
    pending=replace(SPEC, memory=2 * GIB),
    run=Run(
        pid=7, start_time=9, boot_id="boot", started_at=2001, accelerator="tcg", qemu_version="10.0.2", start_count=3
    ),
    last_exit=Exit(at=1999, reason="guest-shutdown", detail="the guest powered itself off", last_lines="bye\n日本"),
    seeded=True,
    labels={"team": "größe 🐧"},
    remove_when_stopped=True,
)
OPERATION = Operation(
    id="3" * 32,
    verb="stop",
    subject=WEB.id,
    subject_name="web",
    request={"vm_id": WEB.id, "timeout": 1.5},
    state="stuck",
    owner=Owner(pid=7, start_time=9, boot_id="boot"),
    created_at=2002,
    steps=(StepRecord(name="ask", state="done"), StepRecord(name="wait", state="undo-failed", error="no answer")),
    notes={"asked": ["agent"]},
    error="no answer",
    cancel_requested=True,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "atoll.db"


@pytest.fixture
def records(path: Path) -> Iterator[SqliteRecords]:
    with opened(path) as records:
        yield records


def opened(path: Path) -> "contextlib.closing[SqliteRecords]":
    return contextlib.closing(SqliteRecords(path))


def vm(name: str, *ports: PortSpec | int) -> Vm:
    """A small VM; its id is its name."""
    specs = tuple(p if isinstance(p, PortSpec) else PortSpec(host_port=p, guest_port=80) for p in ports)
    nic = NicSpec(name="net0", mac="52:54:00:00:00:01", ports=specs)
    return Vm(id=name, name=name, image="", created_at=0, spec=VmSpec(nics=(nic,)))


def image(name: str, *tags: str) -> Image:
    return Image(id=f"id-{name}", name=name, tags=tags, arch="x86_64", created_at=0, source="", sha256="")


def operation(number: int, state: str = "done") -> Operation:
    return replace(
        OPERATION, id=f"{number:032x}", created_at=float(number), state=state, notes={}, cancel_requested=False
    )


def sql(path: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    """Change or read the file without Atoll."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement, values).fetchall()


# The schema


def everything(records: SqliteRecords) -> tuple[object, ...]:
    events = [(event.kind, event.vm_id, event.name, event.data) for event in records.events()]
    return records.vms(), records.images(), records.layers(), records.operations(), events


def put_everything(records: SqliteRecords) -> None:
    records.add_image(IMAGE, [LAYER])
    records.add_vm(WEB)
    records.put_operation(OPERATION)
    records.add_event("vm.created", vm_id=WEB.id, name="web", data={"image": "debian:13"})


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
        with pytest.raises(AlreadyExists, match="port 8080 is taken by 'web'"):
            records.add_vm(vm("other", 8080))
        assert [found.name for found in records.throwaways()] == ["web"]
    assert sql(path, "PRAGMA user_version") == [(NEWEST,)]


def test_the_next_migration_runs_once_on_data_that_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as records:
        put_everything(records)
        before = everything(records)
    column = "ALTER TABLE layers ADD COLUMN seen INTEGER NOT NULL DEFAULT 7; CREATE INDEX by_seen ON layers(seen);"
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*MIGRATIONS, column))
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
        patch.setattr(sqlite, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE more (id TEXT); DROP TABLE absent;"))
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


# Several processes


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from atoll.errors import AlreadyExists
from tests.unit.test_store import SqliteRecords, image, operation, vm
sys.stdin.readline()
me, records = sys.argv[3], SqliteRecords(Path(sys.argv[2]))
try:
    records.add_vm(vm("everyones", 80))
    print("mine")
except AlreadyExists:
    pass
for number in range(1_000_000 if me == "endless" else 25):
    name = f"{me}-{number}"
    records.add_vm(vm(name))
    records.add_event("tick", vm_id=name)
    print(name, flush=True)
"""


def writer(path: Path, name: str) -> subprocess.Popen[str]:
    """A process that writes from the moment that it is sent a line."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(ROOT), str(path), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    writers = [writer(path, name) for name in "abcd"]
    try:
        for process in writers:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate(timeout=60)[0].splitlines() for process in writers]
    finally:
        for process in writers:
            process.kill()
            process.communicate()
    names = {f"{name}-{number}" for name in "abcd" for number in range(25)}
    assert sum(lines.count("mine") for lines in told) == 1
    with opened(path) as records:
        assert {found.id for found in records.vms()} == names | {"everyones"}
        events = records.events()
    assert {event.vm_id for event in events} == names
    assert [event.id for event in events] == list(range(1, 101))


def test_what_a_killed_process_had_written_is_there(path: Path) -> None:
    process = writer(path, "endless")
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        told = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
    finally:
        process.kill()
        process.communicate()
    with opened(path) as records:
        assert {line.strip() for line in told if line.endswith("\n")} - {"mine"} <= {vm.id for vm in records.vms()}
        records.add_vm(vm("after", 81))
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


# Files that can't be used


def a_full_database(path: Path) -> None:
    with opened(path) as records:
        put_everything(records)
        for number in range(200):
            records.add_vm(vm(f"vm-{number}"))


def spoil(path: Path, start: int, junk: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:start] + junk + content[start + len(junk) :])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no database": lambda path: path.write_text("name: web\n" * 100),
    "a header that is spoilt": lambda path: spoil(path, 0, b"\xff" * 100),
    "pages that are spoilt": lambda path: spoil(path, 4096, b"\xff" * (path.stat().st_size - 4096)),
    "a file that was cut": cut,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_once_and_left_as_it_is(path: Path, damage: str) -> None:
    a_full_database(path)
    DAMAGES[damage](path)
    content = path.read_bytes()
    for use in (SqliteRecords.vms, SqliteRecords.images, lambda records: records.add_vm(vm("new"))):
        with pytest.raises(RecordsFailed, match="it is damaged") as failed, opened(path) as records:
            use(records)
        assert str(path) in failed.value.what
        assert ".recover" in failed.value.next_step
    assert path.read_bytes() == content


def test_a_folder_in_its_place_is_told(path: Path) -> None:
    path.mkdir()
    with pytest.raises(RecordsFailed, match="it is a folder") as failed:
        SqliteRecords(path)
    assert "Move it away" in failed.value.next_step
    assert list(path.iterdir()) == []


def test_a_schema_that_lacks_a_table_is_told(path: Path, records: SqliteRecords) -> None:
    sql(path, "DROP TABLE events")
    with pytest.raises(RecordsFailed, match="no such table: events"):
        records.add_event("tick")
    records.add_vm(vm("web"))


JUNK = [b"", b"\xff\xfe", b'{"id": "cut', b'{"id": "\xff"}', b"[]", b'{"id": "x", "colour": "red"}']


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(
    ("table", "use"),
    [
        ("vms", SqliteRecords.vms),
        ("vms", lambda records: records.vm(WEB.id)),
        ("vms", SqliteRecords.throwaways),
        ("images", SqliteRecords.images),
        ("images", lambda records: records.put_image_names(IMAGE.id, ["x"])),
        ("images", lambda records: records.add_image(image("new", "debian:13"), [])),
        ("layers", SqliteRecords.layers),
        ("layers", lambda records: records.layer("base")),
        ("operations", SqliteRecords.operations),
        ("operations", lambda records: records.put_operation(OPERATION)),
        ("operations", lambda records: records.request_cancel(OPERATION.id)),
    ],
)  # fmt: skip
def test_a_damaged_record_is_told_and_nothing_changes(
    path: Path, records: SqliteRecords, table: str, use: Callable[[SqliteRecords], object], junk: bytes
) -> None:
    put_everything(records)
    sql(path, f"UPDATE {table} SET record = ?", junk)
    before = readable_names(path)
    with pytest.raises(RecordsFailed, match=r"a record in .*atoll.db can't be read") as failed:
        use(records)
    assert "upgrade, or restore a backup" in failed.value.next_step
    assert readable_names(path) == before
    assert sql(path, f"SELECT record FROM {table}") == [(junk,)]
    records.add_event("the others can still be used")


def readable_names(path: Path) -> list[tuple[object, ...]]:
    return sql(path, "SELECT name, image_id FROM image_names ORDER BY name")


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe", b"[]", b'{"cut'])
def test_a_damaged_event_is_told(path: Path, records: SqliteRecords, junk: bytes) -> None:
    records.add_event("tick")
    sql(path, "UPDATE events SET data = ?", junk)
    with pytest.raises(RecordsFailed, match="can't be read"):
        records.events()


def test_a_full_disk_is_told_as_one_and_the_connection_goes_on(records: SqliteRecords) -> None:
    put_everything(records)
    db = records._connection
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    # SQLite's own bound of the file's size fails as a full disk does.
    db.execute(f"PRAGMA max_page_count = {pages}")
    big = replace(vm("big", 90), labels={"text": "x" * 100_000})
    with pytest.raises(RecordsFailed, match="the disk is full") as failed:
        records.add_vm(big)
    assert "image prune" in failed.value.next_step
    assert records.vms() == [WEB]
    db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    records.add_vm(big)
    assert len(records.vms()) == 2


READER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from atoll.errors import AtollError
from tests.unit.test_store import SqliteRecords, vm
try:
    SqliteRecords(Path(sys.argv[2])).add_vm(vm("new"))
except AtollError as error:
    print(type(error).__name__, "|", error.why, "|", error.next_step)
"""


@pytest.mark.parametrize("others_read", [True, False])
def test_a_file_that_this_user_may_not_write_is_told(home: Path, others_read: bool) -> None:
    path = home / "atoll.db"
    with opened(path) as records:
        records.add_vm(WEB)
    path.chmod(0o444 if others_read else 0)
    home.chmod(0o555)
    content = path.read_bytes()
    told = subprocess.run(
        [sys.executable, "-c", READER, str(ROOT), str(path)],
        check=True,
        capture_output=True,
        text=True,
        **({"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}),
    ).stdout
    home.chmod(0o755)
    name, why, next_step = told.split(" | ")
    assert name == "RecordsFailed"
    assert "it can't be written" in why
    assert "owner and mode" in next_step
    assert path.read_bytes() == content
    assert [each.name for each in home.iterdir()] == [path.name]
