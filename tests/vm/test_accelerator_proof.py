"""Proofs of accelerators with the machine's own QEMU."""

import os
from pathlib import Path

import pytest

from atoll.errors import StorageFailed
from atoll.host import accelerator, facts, process
from atoll.host.accelerator import prove, run_payload
from atoll.host.payload import PAYLOADS
from atoll.layout import Layout, find
from atoll.model.spec import Arch

pytestmark = pytest.mark.vm

ARCHES: list[Arch] = ["x86_64", "aarch64", "riscv64"]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return find({"ATOLL_HOME": str(tmp_path)})


def qemu(arch: str) -> Path:
    return Path(process.find(f"qemu-system-{arch}"))


@pytest.mark.parametrize("arch", ARCHES)
async def test_the_payload_runs_under_emulation(arch: Arch) -> None:
    proof = await run_payload(qemu(arch), "tcg", arch=arch)
    assert proof.usable, proof.reason


@pytest.mark.parametrize("arch", ARCHES)
async def test_a_payload_that_does_nothing_proves_nothing(arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = PAYLOADS[arch]
    idle = accelerator.PAYLOADS | {
        arch: type(payload)(payload.arguments, bytes(len(payload.content)), payload.exit_code)
    }
    monkeypatch.setattr(accelerator, "PAYLOADS", idle)
    monkeypatch.setattr(accelerator, "PROOF_TIME", 0.5)
    proof = await run_payload(qemu(arch), "tcg", arch=arch)
    assert not proof.usable
    assert "did not run" in proof.reason


async def test_the_payload_needs_a_processor_with_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = PAYLOADS["x86_64"]
    # The later of two -cpu options holds: a 32-bit processor.
    old = type(payload)(("-cpu", "qemu32", *payload.arguments), payload.content, payload.exit_code)
    monkeypatch.setattr(accelerator, "PAYLOADS", {**PAYLOADS, "x86_64": old})
    monkeypatch.setattr(accelerator, "PROOF_TIME", 0.5)
    assert not (await run_payload(qemu("x86_64"), "tcg", arch="x86_64")).usable


async def test_a_refused_accelerator_gives_qemus_own_words() -> None:
    proof = await run_payload(qemu("x86_64"), "hvf", arch="x86_64")
    assert not proof.usable
    assert "hvf" in proof.reason


async def test_emulation_is_the_last_resort_and_is_always_there(layout: Layout) -> None:
    proofs = await prove(layout, qemu("x86_64"))
    assert [each.name for each in proofs] == ["kvm", "tcg"]
    assert proofs[1].usable


@pytest.mark.skipif(facts.cpu().flags & {"vmx", "svm"} != set(), reason="this processor runs guests itself")
@pytest.mark.skipif(facts.kvm_state() != "usable", reason="needs a /dev/kvm that opens")
async def test_a_kvm_that_opens_without_the_processors_help_is_not_believed(layout: Layout) -> None:
    kvm = (await prove(layout, qemu("x86_64")))[0]
    assert not kvm.usable
    assert "no vmx/svm flag" in kvm.reason


async def test_hardware_is_for_guests_of_the_same_architecture(layout: Layout) -> None:
    other: Arch = "aarch64" if facts.architecture() != "aarch64" else "x86_64"
    hardware = (await prove(layout, qemu(other)))[0]
    assert not hardware.usable
    assert "own architecture" in hardware.reason


async def test_a_proof_is_kept_until_the_binary_changes(layout: Layout, tmp_path: Path) -> None:
    binary = tmp_path / "qemu-system-x86_64"
    binary.symlink_to(qemu("x86_64"))
    first = await prove(layout, binary)
    binary.unlink()
    binary.write_text("#!/bin/sh\nexit 7\n")
    binary.chmod(0o755)
    assert first[1].usable
    assert not (await prove(layout, binary))[1].usable
    stat = binary.stat()
    binary.write_text("#!/bin/sh\nexit 8\n")
    os.utime(binary, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "exit code 7" in (await prove(layout, binary))[1].reason, "the same size and time: what was kept holds"


async def test_a_damaged_file_of_proofs_is_made_again(layout: Layout) -> None:
    layout.cache.mkdir()
    layout.accelerator.write_text('{"half')
    assert (await prove(layout, qemu("x86_64")))[1].usable
    assert b"half" not in layout.accelerator.read_bytes()


async def test_proofs_do_not_need_a_place_to_be_kept(layout: Layout) -> None:
    layout.cache.parent.mkdir(exist_ok=True)
    layout.cache.write_text("a file where the folder should be")
    assert (await prove(layout, qemu("x86_64")))[1].usable


async def test_a_binary_that_is_not_there_is_told(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="qemu-system-x86_64"):
        await prove(layout, tmp_path / "qemu-system-x86_64")
