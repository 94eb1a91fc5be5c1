"""A folder of backups: what is believed of it, and which backup a word means. No guest, no image."""

import asyncio
import hashlib
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from atoll.errors import InvalidInput, NotFound, StorageFailed
from atoll.model.backup import Backup, BackupDisk, StoredBlob, StoredLayer
from atoll.model.image import Layer
from atoll.model.spec import BootSpec, DiskSpec, VmSpec
from atoll.operations import backup_find
from atoll.operations.backup_files import expanded
from atoll.store import backup_folder, backup_manifests
from atoll.store.backup_folder import BackupFolder

ONE, TWO, SHA = "1" * 32, "2" * 32, "a" * 64


def backup(number: int, *, vm: str = ONE, name: str = "web", **changes: object) -> Backup:
    made = Backup(
        id=f"2026010{number}T000000Z-00{number:02}",
        vm_id=vm,
        vm_name=name,
        created_at=number * 86400,
        image="tiny",
        spec=VmSpec(disks=(DiskSpec(name="root", size=512, layer=TWO),)),
        disks=(BackupDisk(name="root", size=512, chain=(ONE, TWO)),),
        layers=tuple(StoredLayer(id=each, sha256=SHA, size=1, virtual_size=512) for each in (ONE, TWO)),
    )
    return replace(made, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> BackupFolder:
    made = backup_folder.made(tmp_path / "backups")

    async def begin() -> None:
        async with backup_folder.writing(made):
            pass

    asyncio.run(begin())
    return made


def put(folder: BackupFolder, *backups: Backup) -> None:
    for each in backups:
        backup_manifests.put_manifest(folder, each)


def test_manifests_come_back_as_they_were_oldest_first(folder: BackupFolder) -> None:
    put(folder, backup(2), backup(1), backup(3, vm=TWO, name="db"))
    assert backup_manifests.manifests(folder) == ([backup(1), backup(2), backup(3, vm=TWO, name="db")], [])
    assert backup_manifests.manifests(folder, vm_id=TWO)[0] == [backup(3, vm=TWO, name="db")]
    assert folder.manifest(backup(1)).stat().st_mode & 0o777 == 0o444
    assert not any(folder.temporary.iterdir())


def test_any_changed_byte_of_a_manifest_is_noticed(folder: BackupFolder) -> None:
    put(folder, backup(1))
    path = folder.manifest(backup(1))
    content = path.read_bytes()
    path.chmod(0o644)
    for place in range(0, len(content) - 1, 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert backup_manifests.manifests(folder)[0] == [], place
    for short in range(0, len(content) - 2, 11):
        path.write_bytes(content[:short])
        assert backup_manifests.manifests(folder)[0] == [], short


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ()},
        {"disks": ()},
        {"disks": (BackupDisk(name="root", size=512, chain=(TWO, ONE)),)},
        {"disks": (BackupDisk(name="root", size=1024, chain=(ONE, TWO)),)},
        {"nvram": "b" * 64},
        {"spec": VmSpec(boot=BootSpec(kernel="b" * 64))},
        {"spec": VmSpec(disks=(DiskSpec(name="../x", size=1, blob=SHA),)), "blobs": (StoredBlob(sha256=SHA, size=1),)},
        {"layers": (StoredLayer(id="../../../etc/passwd", sha256=SHA, size=1, virtual_size=512),)},
        {"layers": (StoredLayer(id=ONE + "\n", sha256=SHA, size=1, virtual_size=512),)},
        {"id": "../x"},
    ],
)  # fmt: skip
def test_a_manifest_with_the_right_checksum_that_cannot_be_true_is_refused(
    folder: BackupFolder, changes: dict[str, object]
) -> None:
    good = backup(1)
    put(folder, good)
    body = msgspec.json.encode(replace(good, **changes))
    sha256 = hashlib.sha256(body).hexdigest().encode()
    path = folder.manifest(good)
    path.chmod(0o644)
    path.write_bytes(b'{"sha256":"' + sha256 + b'","backup":' + body + b"}")
    assert isinstance(backup_manifests.read_manifest(path), backup_manifests.Unreadable)


def test_words_find_backups_and_a_lost_newest_one_is_never_passed_over(folder: BackupFolder) -> None:
    put(folder, backup(1), backup(2), backup(3, vm=TWO, name="db"))

    def found(word: str | None) -> str:
        return backup_find.find(folder.path, word).id

    assert found("web") == found(ONE) == backup(2).id
    assert found(backup(1).id) == found("20260101") == backup(1).id
    with pytest.raises(InvalidInput, match="fits 3 backups"):
        found("2026")
    with pytest.raises(InvalidInput, match="several VMs"):
        found(None)
    with pytest.raises(NotFound, match="no backup of 'nothing'"):
        found("nothing")
    newest = folder.manifest(backup(2))
    newest.chmod(0o644)
    newest.write_text("{}")
    for word in ("web", ONE, backup(2).id):
        with pytest.raises(StorageFailed, match="can't be read"):
            found(word)
    assert found("db") == backup(3).id
    assert [each.id for each in backup_find.listed(folder.path)] == [backup(1).id, backup(3).id]
    assert len(backup_find.unreadable(folder.path)) == 1


def test_a_vm_is_found_by_names_that_it_had(folder: BackupFolder) -> None:
    put(folder, backup(1, name="old"), backup(2, name="new"))
    assert len(backup_find.listed(folder.path, "old")) == len(backup_find.listed(folder.path, "new")) == 2


def test_a_layer_that_is_not_whole_is_not_had(folder: BackupFolder) -> None:
    layer = StoredLayer(id=ONE, sha256=SHA, size=4, virtual_size=512)
    assert backup_folder.stored_layer(folder, ONE) is None
    backup_folder.put_layer_note(folder, layer, name="x")
    assert backup_folder.stored_layer(folder, ONE) is None
    folder.layer(ONE).write_bytes(b"1234")
    assert backup_folder.stored_layer(folder, ONE) == layer
    folder.layer(ONE).write_bytes(b"123")
    assert backup_folder.stored_layer(folder, ONE) is None


def test_merged_layers_are_expanded_as_far_as_all_parts_are_there() -> None:
    def layer(name: str, *merged: str) -> Layer:
        return Layer(id=name, virtual_size=1, file_size=1, merged=merged)

    known = {each.id: each for each in (layer("a"), layer("ab", "a", "b"), layer("abc", "ab", "c"))}
    assert expanded("abc", known, {"a", "b", "c"}.__contains__) == ["a", "b", "c"]
    assert expanded("abc", known, {"ab", "c", "a"}.__contains__) == ["ab", "c"]
    assert expanded("abc", known, {"a", "c"}.__contains__) is None
    assert expanded("a", known, set().__contains__) is None
    assert expanded("unknown", known, set().__contains__) is None


def test_leftovers_go_when_somebody_writes(folder: BackupFolder) -> None:
    (folder.temporary / "left").write_text("")

    async def write() -> None:
        async with backup_folder.writing(folder):
            assert not any(folder.temporary.iterdir())

    asyncio.run(write())


def test_a_folder_begun_by_a_killed_process_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    backup_folder.made(begun)
    assert backup_folder.made(begun).path == begun
    (begun / "layers" / "x").write_text("")
    with pytest.raises(InvalidInput, match="has other things in it"):
        backup_folder.made(begun)
    with pytest.raises(InvalidInput, match="has no backups"):
        backup_folder.opened(begun)
