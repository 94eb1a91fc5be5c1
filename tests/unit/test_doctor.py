"""The doctor's checks, on this machine as it is and with something taken away from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.host.checks import Check
from atoll.layout import Layout, find
from atoll.operations.doctor import _lists_user, examine
from atoll.operations.services import Services
from atoll.qemu import probe


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return find({"ATOLL_HOME": str(tmp_path / "home")})


async def examined(layout: Layout) -> dict[str, Check]:
    services = Services(layout)
    try:
        checks = await examine(services)
    finally:
        services.close()
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


async def test_each_check_says_something_and_each_bad_one_its_meaning_and_a_remedy(layout: Layout) -> None:
    checks = await examined(layout)
    for check in checks.values():
        assert check.found
        assert check.ok == "ok" or (check.meaning and check.remedy), check
    assert checks["Records"].found == "0 VMs"


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
    network = checks["slirp4netns"]
    assert (network.ok, network.remedy) == ("failed", "sudo apt-get install slirp4netns")


async def test_a_qemu_that_is_too_old_is_told(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "OLDEST", (99, 2, 0))
    check = (await examined(layout))["QEMU for x86_64"]
    assert check.ok == "failed"
    assert "is version " in check.found
    assert check.meaning == "Atoll needs 99.2 or newer"


async def test_what_is_no_qemu_is_told(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "qemu-system-x86_64"
    broken.write_text("#!/bin/sh\necho 'a library is missing' >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = (await examined(layout))["QEMU for x86_64"]
    assert check.ok == "failed"
    assert "a library is missing" in check.found


async def test_the_firmware_is_the_one_that_a_vm_would_get(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await examined(layout))["UEFI for x86_64"].found.endswith("OVMF_CODE_4M.fd")
    monkeypatch.setattr("atoll.qemu.firmware.folders", list)
    check = (await examined(layout))["UEFI for x86_64"]
    assert (check.ok, check.remedy) == ("warning", "sudo apt-get install ovmf")


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
    layout.data.mkdir(parents=True)
    layout.database.write_bytes(b"no database at all" * 100)
    check = (await examined(layout))["Records"]
    assert check.ok == "failed"
    assert str(layout.database) in check.found


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
