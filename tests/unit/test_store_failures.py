"""The records when several processes write, when one is killed, and when the file can't be used."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers.records import IMAGE, OPERATION, WEB, image, opened, put_everything, sql, vm
from tests.helpers.tool import ROOT

from atoll.errors import RecordsFailed
from atoll.store.sqlite import SqliteRecords


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "atoll.db"


@pytest.fixture
def records(path: Path) -> Iterator[SqliteRecords]:
    with opened(path) as records:
        yield records


# Several processes


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from atoll.errors import AlreadyExists
from atoll.store.sqlite import SqliteRecords
from tests.helpers.records import vm
print("ready", flush=True)
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


@contextlib.contextmanager
def writers(path: Path, *names: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that begin to write at the same moment."""
    argv = [sys.executable, "-c", WRITER, str(ROOT), str(path)]
    started = [
        subprocess.Popen([*argv, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in names
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    with writers(path, *"abcd") as started:
        told = [process.communicate(timeout=60)[0].splitlines() for process in started]
    names = {f"{name}-{number}" for name in "abcd" for number in range(25)}
    assert sum(lines.count("mine") for lines in told) == 1
    with opened(path) as records:
        assert {found.id for found in records.vms()} == names | {"everyones"}
        events = records.events()
    assert {event.vm_id for event in events} == names
    assert [event.id for event in events] == list(range(1, 101))


def test_what_a_killed_process_had_written_is_there(path: Path) -> None:
    with writers(path, "endless") as (process,):
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(20)]
        process.kill()
        told += process.stdout.readlines()
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
    db = records._db.connection
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    # SQLite's own bound of the file's size fails as a full disk does.
    db.execute(f"PRAGMA max_page_count = {pages}")
    big = replace(vm("big", 90), labels={"text": "x" * 100_000})
    with pytest.raises(RecordsFailed, match="the disk is full") as failed:
        records.add_vm(big)
    assert "atoll prune" in failed.value.next_step
    assert records.vms() == [WEB]
    db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    records.add_vm(big)
    assert len(records.vms()) == 2


READER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from atoll.errors import AtollError
from atoll.store.sqlite import SqliteRecords
from tests.helpers.records import vm
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
    content = path.read_bytes()
    path.chmod(0o444 if others_read else 0)
    home.chmod(0o555)
    told = subprocess.run(
        [sys.executable, "-c", READER, str(ROOT), str(path)],
        check=True,
        capture_output=True,
        text=True,
        **({"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}),
    ).stdout
    home.chmod(0o755)
    path.chmod(0o400)
    name, why, next_step = told.split(" | ")
    assert name == "RecordsFailed"
    assert "it can't be written" in why
    assert "owner and mode" in next_step
    assert path.read_bytes() == content
    assert [each.name for each in home.iterdir()] == [path.name]
