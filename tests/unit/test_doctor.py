"""The doctor's checks, on this machine as it is and with something taken away from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.errors import RecordsFailed
from atoll.host.doctor import Check, _lists_user, examine
from atoll.layout import Layout, find


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return find({"ATOLL_HOME": str(tmp_path / "home")})


async def examined(layout: Layout) -> dict[str, Check]:
    return {check.name: check for check in await examine(layout)}


async def test_each_check_has_a_name_of_its_own_and_each_bad_one_a_meaning_and_a_remedy(layout: Layout) -> None:
    checks = await examine(layout, read_records=lambda: "no VMs yet")
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.found
        assert check.ok == "ok" or (check.meaning and check.remedy), check
    assert next(check.found for check in checks if check.name == "Records") == "no VMs yet"


async def test_a_machine_without_qemu_is_told_what_to_install(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = await examined(layout)
    own, other = checks["QEMU for x86_64"], checks["QEMU for aarch64"]
    assert (own.ok, own.found, own.remedy) == ("failed", "not installed", "sudo apt-get install qemu-system-x86")
    assert (other.ok, other.remedy) == ("warning", "sudo apt-get install qemu-system-arm")
    assert checks["Accelerator"].ok == "failed"
    assert checks["qemu-img"].remedy == "sudo apt-get install qemu-utils"
    assert checks["newuidmap"].remedy == "sudo apt-get install uidmap"


async def test_a_qemu_that_is_too_old_is_told(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "qemu-system-x86_64"
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.17 (Debian 1:7.2+dfsg-7)'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = (await examined(layout))["QEMU for x86_64"]
    assert (check.ok, check.found, check.meaning) == ("failed", "version 7.2.17", "Atoll needs QEMU 8.2 or newer")


async def test_a_mke2fs_without_archives_is_found_by_trying_it(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await examined(layout))["mke2fs from an archive"].ok == "ok"
    old = tmp_path / "mke2fs"
    old.write_text("#!/bin/sh\necho 'mke2fs: Not a directory while populating file system' >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = (await examined(layout))["mke2fs from an archive"]
    assert check.ok == "warning"
    assert "Not a directory while populating" in check.found


async def test_a_folder_that_can_not_be_made_is_a_failure_with_a_way_out(layout: Layout) -> None:
    layout.data.parent.mkdir()
    layout.data.write_text("a file where the folder should be")
    check = (await examined(layout))["Data folder"]
    assert check.ok == "failed"
    assert str(layout.data) in check.found
    assert "ATOLL_HOME" in check.remedy


async def test_records_that_can_not_be_read_are_a_failure(layout: Layout) -> None:
    def read() -> str:
        raise RecordsFailed("the database is damaged", "malformed", "Restore it from a copy.")

    checks = await examine(layout, read_records=read)
    assert ("failed", "Restore it from a copy.") in [(c.ok, c.remedy) for c in checks if c.name == "Records"]


def test_subordinate_ids_count_by_name_or_number_and_only_when_there_are_enough(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_text("anna:100000:65536\nben:165536:1000\n\ndamaged\n" + f"{os.getuid()}:300000:65536\n")
    assert _lists_user(file, "anna")
    assert _lists_user(file, "carl")  # by this user's number
    file.write_text("ben:165536:1000\n")
    assert not _lists_user(file, "ben")
    assert not _lists_user(tmp_path / "absent", "ben")


def test_facts_cost_no_slow_imports() -> None:
    code = "import atoll.host.facts, sys; sys.exit(bool({'asyncio', 'ctypes', 'subprocess'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
