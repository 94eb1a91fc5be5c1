"""Choosing an accelerator, and the bytes of the guest that proves one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from atoll.errors import Unsupported
from atoll.host.accelerator import Accelerator, choose, guest_architecture, kvm_obstacle
from atoll.host.payload import CODE, SOURCE

BROKEN_KVM = Accelerator(name="kvm", usable=False, reason="there is no /dev/kvm")
KVM = Accelerator(name="kvm", usable=True, reason="a 64-bit guest ran")
TCG = Accelerator(name="tcg", usable=True, reason="a 64-bit guest ran")
BROKEN_TCG = Accelerator(name="tcg", usable=False, reason="this QEMU was built without it")


def test_auto_takes_the_first_that_is_usable() -> None:
    assert choose("auto", [KVM, TCG]) == KVM
    assert choose("auto", [BROKEN_KVM, TCG]) == TCG


def test_emulation_can_be_asked_for_where_hardware_would_do() -> None:
    assert choose("tcg", [KVM, TCG]) == TCG


def test_an_accelerator_that_is_not_usable_is_refused_with_its_reason() -> None:
    with pytest.raises(Unsupported, match=re.escape("kvm can't be used: there is no /dev/kvm. Leave")):
        choose("kvm", [BROKEN_KVM, TCG])


def test_an_accelerator_of_another_system_is_refused() -> None:
    with pytest.raises(Unsupported, match="linux has no hvf"):
        choose("hvf", [KVM, TCG])


def test_no_usable_accelerator_at_all_tells_each_reason() -> None:
    with pytest.raises(Unsupported, match="kvm: there is no /dev/kvm; tcg: this QEMU was built without it"):
        choose("auto", [BROKEN_KVM, BROKEN_TCG])


def test_a_binary_is_known_by_its_name() -> None:
    assert guest_architecture(Path("/usr/bin/qemu-system-aarch64")) == "aarch64"
    with pytest.raises(Unsupported):
        guest_architecture(Path("/usr/bin/qemu-system-sparc"))


def test_the_processor_is_the_first_thing_that_kvm_can_lack() -> None:
    cloud, desktop = frozenset({"hypervisor"}), frozenset({"vmx"})
    assert kvm_obstacle("usable", cloud, "x86_64").startswith("/dev/kvm opens, but the processor has no vmx/svm flag")
    assert "no vmx/svm flag" in kvm_obstacle("forbidden", cloud, "x86_64")
    assert kvm_obstacle("forbidden", desktop, "x86_64") == "/dev/kvm is there, but this user may not open it"
    assert kvm_obstacle("absent", desktop, "x86_64") == "there is no /dev/kvm"


def test_nothing_known_speaks_against_kvm_where_it_opens_and_the_processor_helps() -> None:
    assert kvm_obstacle("usable", frozenset({"svm"}), "x86_64") == ""
    assert kvm_obstacle("usable", frozenset({"fp", "asimd"}), "aarch64") == ""


@pytest.mark.skipif(shutil.which("as") is None, reason="needs an assembler")
def test_the_payload_is_what_its_source_says(tmp_path: Path) -> None:
    object_file, flat = tmp_path / "payload.o", tmp_path / "payload"
    subprocess.run(["as", "--64", "-o", object_file], input=SOURCE["x86_64"].encode(), check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", object_file, flat], check=True)
    assert flat.read_bytes() == CODE["x86_64"]
