"""The kernel's page merging: what is written where, and that all is as it was afterwards."""

import os
from pathlib import Path

import pytest

from atoll.errors import InvalidInput, Unsupported
from atoll.host import page_merging
from atoll.host.page_merging import merged, merged_of, merging, put_back

PAGE = os.sysconf("SC_PAGE_SIZE")
ADVISED = {"advisor_mode": "[none] scan-time", "pages_to_scan": "100", "run": "0"}
OLDER = {"pages_to_scan": "100", "run": "0"}


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "run" / "note.json"


def kernel(folder: Path, settings: dict[str, str]) -> Path:
    """A folder like /sys/kernel/mm/ksm."""
    made = folder / "ksm"
    made.mkdir()
    for name, value in settings.items():
        (made / name).write_text(f"{value}\n")
    return made


def settings(folder: Path) -> dict[str, str]:
    return {each.name: each.read_text().strip() for each in folder.iterdir()}


def test_it_scans_by_the_amount_of_memory_and_puts_all_back(tmp_path: Path, note: Path) -> None:
    folder = kernel(tmp_path, ADVISED)
    with merging(note, wanted=True, folder=folder) as said:
        assert said == ""
        assert settings(folder) == {"advisor_mode": "scan-time", "pages_to_scan": "100", "run": "1"}
        assert merged(folder).on
    assert settings(folder) == {"advisor_mode": "none", "pages_to_scan": "100", "run": "0"}
    assert not note.exists()


def test_an_older_kernel_scans_moderately(tmp_path: Path, note: Path) -> None:
    folder = kernel(tmp_path, OLDER)
    with merging(note, wanted=True, folder=folder):
        assert settings(folder) == {"pages_to_scan": str(page_merging.PAGES_TO_SCAN), "run": "1"}
    assert settings(folder) == OLDER


def test_a_faster_scan_of_the_owners_is_kept(tmp_path: Path, note: Path) -> None:
    folder = kernel(tmp_path, OLDER | {"pages_to_scan": "5000"})
    with merging(note, wanted=True, folder=folder):
        assert settings(folder)["pages_to_scan"] == "5000"


def test_all_is_put_back_also_when_it_fails(tmp_path: Path, note: Path) -> None:
    folder = kernel(tmp_path, OLDER)
    with pytest.raises(ZeroDivisionError), merging(note, wanted=True, folder=folder):
        raise ZeroDivisionError
    assert settings(folder) == OLDER


@pytest.mark.parametrize("wanted", [True, False])
def test_the_next_one_puts_back_what_a_killed_one_left(tmp_path: Path, note: Path, wanted: bool) -> None:
    folder = kernel(tmp_path, OLDER)
    killed = merging(note, wanted=True, folder=folder)
    killed.__enter__()
    kept = note.read_bytes()
    killed.__exit__(None, None, None)
    note.write_bytes(kept)
    (folder / "run").write_text("1")
    with merging(note, wanted=wanted, folder=folder) as said:
        assert merged(folder).on is wanted
        assert ("killed" in said) is not wanted
    assert settings(folder) == OLDER


def test_what_another_boot_left_is_forgotten(tmp_path: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kernel(tmp_path, OLDER)
    with merging(note, wanted=True, folder=folder):
        kept = note.read_bytes()
    note.write_bytes(kept)
    (folder / "run").write_text("1")
    monkeypatch.setattr(page_merging.facts, "boot_id", lambda: "another")
    assert not put_back(note, folder=folder)
    assert settings(folder)["run"] == "1"
    assert not note.exists()


def test_a_torn_note_is_forgotten(tmp_path: Path, note: Path) -> None:
    folder = kernel(tmp_path, OLDER)
    note.parent.mkdir()
    note.write_bytes(b"{")
    with merging(note, wanted=False, folder=folder) as said:
        assert said == ""
    assert not note.exists()


def test_what_is_on_already_is_left_alone(tmp_path: Path, note: Path) -> None:
    folder = kernel(tmp_path, ADVISED | {"run": "1"})
    with merging(note, wanted=True, folder=folder) as said:
        assert "already" in said
        assert not note.exists()
    assert settings(folder) == ADVISED | {"run": "1"}


def test_a_kernel_without_it_is_told(tmp_path: Path, note: Path) -> None:
    with pytest.raises(Unsupported, match="can't merge"), merging(note, wanted=True, folder=tmp_path / "none"):
        pass
    with merging(note, wanted=False, folder=tmp_path / "none"):
        assert not merged(tmp_path / "none").on


def test_an_ordinary_user_is_told(tmp_path: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kernel(tmp_path, OLDER)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InvalidInput, match="root"), merging(note, wanted=True, folder=folder):
        pass
    assert settings(folder) == OLDER


def test_what_is_saved(tmp_path: Path) -> None:
    folder = kernel(tmp_path, {"run": "1", "pages_shared": "10", "pages_sharing": "70", "ksm_zero_pages": "5"})
    now = merged(folder)
    assert (now.saved, now.share_saved) == (75 * PAGE, 7 / 8)
    process = tmp_path / "42"
    process.mkdir()
    (process / "ksm_merging_pages").write_text("8\n")
    assert merged_of(42, tmp_path) == 8 * PAGE
    assert merged_of(43, tmp_path) == 0
