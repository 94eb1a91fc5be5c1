"""UEFI firmware by its descriptor files: where they are looked for, which count, and which fits."""

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.errors import Unsupported
from atoll.model.launch import Firmware
from atoll.qemu.firmware import choose, folders, read_descriptors

Q35, VIRT = "pc-q35-10.0", "virt-10.0"


class Files:
    """A user's, an administrator's and a distribution's folder, in that order, with firmware beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders = [root / name for name in ("own", "etc", "share")]
        for name in ("CODE.fd", "VARS.fd"):
            (root / name).write_bytes(b"firmware")

    def put(self, place: str, *, folder: str = "share", text: str | bytes | None = None, **changes: Any) -> str:
        """Write a descriptor; returns its description."""
        path = self.root / folder / place
        path.parent.mkdir(exist_ok=True)
        descriptor: dict[str, Any] = {
            "description": f"{folder}/{place}",
            "interface-types": ["uefi"],
            "mapping": self.mapping(),
            "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
            "features": ["acpi-s3", "amd-sev", "verbose-dynamic"],
            "tags": [],
            "a-field-of-a-later-version": {"x": 1},
        }
        content = json.dumps({**descriptor, **changes}) if text is None else text
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return f"{folder}/{place}"

    def mapping(self, **changes: Any) -> dict[str, Any]:
        flash: dict[str, Any] = {
            "device": "flash",
            "executable": {"filename": str(self.root / "CODE.fd"), "format": "raw"},
            "nvram-template": {"filename": str(self.root / "VARS.fd"), "format": "raw"},
        }
        return flash | changes

    def chosen(self, *, arch: str = "x86_64", machine_type: str = Q35) -> Firmware:
        return choose(read_descriptors(self.folders), arch=arch, machine_type=machine_type)

    def choice(self) -> str:
        """The description of the firmware that a q35 gets."""
        return self.chosen().description


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_firmware_is_told_with_its_files(files: Files) -> None:
    files.put("60-plain.json")
    assert files.chosen() == Firmware(
        code=str(files.root / "CODE.fd"), variables=str(files.root / "VARS.fd"), description="share/60-plain.json"
    )


def test_formats_are_those_of_the_descriptor(files: Files) -> None:
    code = {"filename": str(files.root / "CODE.fd"), "format": "qcow2"}
    files.put("60.json", mapping=files.mapping(executable=code))
    assert (files.chosen().code_format, files.chosen().variables_format) == ("qcow2", "raw")


def test_names_are_taken_in_their_order_across_folders(files: Files) -> None:
    files.put("60-distribution.json")
    files.put("50-later-folder.json", folder="share")
    assert files.choice() == "share/50-later-folder.json"
    first = files.put("40-own.json", folder="own")
    files.put("45-etc.json", folder="etc")
    assert files.choice() == first


def test_an_earlier_folder_hides_the_same_name_in_later_ones(files: Files) -> None:
    files.put("50.json", folder="share")
    expected = files.put("50.json", folder="etc")
    assert files.choice() == expected
    expected = files.put("50.json", folder="own")
    assert files.choice() == expected
    # Also when the one that hides doesn't fit.
    files.put("50.json", folder="own", features=["requires-smm"])
    with pytest.raises(Unsupported):
        files.chosen()


def test_an_empty_file_hides_altogether(files: Files) -> None:
    files.put("50.json")
    other = files.put("60.json")
    files.put("50.json", folder="etc", text="")
    assert files.choice() == other
    (files.root / "etc/60.json").symlink_to("/dev/null")
    with pytest.raises(Unsupported):
        files.chosen()


@pytest.mark.parametrize(
    "damaged",
    [
        "{",
        "null",
        "[]",
        '"text"',
        "{}",
        b"\xff\xfe\x00",
        '{"mapping": null, "targets": null, "interface-types": null}',
        '{"interface-types": ["uefi"], "mapping": {"device": "flash"}, "targets": ["x86_64"]}',
        '{"interface-types": ["uefi"], "mapping": [], "targets": []}',
        '{"interface-types": ["uefi"], "mapping": {"device": "flash", "executable": "/x"}, "targets": []}',
        '{"interface-types": 7, "mapping": {"device": "flash"}, "targets": [], "features": null}',
    ],
)
def test_a_damaged_file_is_passed_over(files: Files, damaged: str | bytes) -> None:
    files.put("10.json", text=damaged)
    expected = files.put("60.json")
    assert files.choice() == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("features", None), ("features", "x"), ("targets", [7]), ("description", 5), ("interface-types", "uefi")],
)
def test_a_field_of_another_kind_is_damage_too(files: Files, field: str, value: object) -> None:
    files.put("10.json", **{field: value})
    expected = files.put("60.json")
    assert files.choice() == expected


def test_what_is_no_file_or_no_descriptor_is_passed_over(files: Files) -> None:
    expected = files.put("60.json")
    (files.root / "share/10.json").mkdir()
    (files.root / "share/20.json").symlink_to(files.root / "absent")
    files.put("README", text="not one")
    files.put("30.json.dpkg-old")
    files.folders.insert(0, files.root / "CODE.fd")  # a file where a folder should be
    assert files.choice() == expected


@pytest.mark.parametrize("feature", ["requires-smm", "secure-boot", "enrolled-keys"])
def test_firmware_that_wants_more_than_a_plain_machine_is_left(files: Files, feature: str) -> None:
    files.put("40.json", features=["acpi-s3", feature])
    expected = files.put("60.json")
    assert files.choice() == expected


def test_other_ways_to_load_a_firmware_are_left(files: Files) -> None:
    files.put("10.json", mapping={"device": "memory", "filename": str(files.root / "CODE.fd")})
    files.put("11.json", mapping=files.mapping(mode="stateless"))
    files.put("12.json", mapping=files.mapping(mode="combined"))
    files.put("13.json", mapping={"device": "kernel", "filename": "/x"})
    files.put("14.json", **{"interface-types": ["bios"]})
    expected = files.put("60.json", mapping=files.mapping(mode="split"))
    assert files.choice() == expected


@pytest.mark.parametrize("part", ["executable", "nvram-template"])
@pytest.mark.parametrize("filename", ["/absent/CODE.fd", "", "\0", "/", "/root/" * 1000])
def test_firmware_whose_files_are_missing_is_left(files: Files, part: str, filename: str) -> None:
    files.put("10.json", mapping=files.mapping(**{part: {"filename": filename, "format": "raw"}}))
    expected = files.put("60.json")
    assert files.choice() == expected


def test_the_architecture_and_the_machine_have_to_fit(files: Files) -> None:
    arm = files.put("10.json", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    old = [{"architecture": "i386", "machines": ["pc-*"]}, {"architecture": "x86_64", "machines": ["pc-i440fx-*"]}]
    files.put("20.json", targets=old)
    with pytest.raises(Unsupported):
        files.chosen()
    assert files.chosen(arch="aarch64", machine_type=VIRT).description == arm


@pytest.mark.parametrize(
    ("arch", "package"), [("x86_64", "ovmf"), ("aarch64", "qemu-efi-aarch64"), ("riscv64", "qemu-efi-riscv64")]
)
def test_without_one_the_package_to_install_is_told(files: Files, arch: str, package: str) -> None:
    with pytest.raises(Unsupported, match=f"there is no UEFI firmware for {arch}") as missing:
        files.chosen(arch=arch)
    assert missing.value.next_step == f"Install it: `sudo apt-get install {package}`."


SYSTEM = [Path("/etc/qemu/firmware"), Path("/usr/local/share/qemu/firmware"), Path("/usr/share/qemu/firmware")]


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        ({"HOME": "/home/me"}, "/home/me/.config/qemu/firmware"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": "/conf"}, "/conf/qemu/firmware"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": ""}, "/home/me/.config/qemu/firmware"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": "relative"}, "/home/me/.config/qemu/firmware"),
        ({"XDG_CONFIG_HOME": "relative"}, None),
        ({"HOME": ""}, None),
        ({}, None),
    ],
)
def test_the_users_own_folder_comes_first_where_there_is_one(environment: dict[str, str], own: str | None) -> None:
    assert folders(environment) == ([Path(own)] if own else []) + SYSTEM


def test_this_machines_own_firmware_is_found() -> None:
    found = choose(read_descriptors(folders()), arch="x86_64", machine_type=Q35)
    assert Path(found.code).stat().st_size > 1 << 20
    assert Path(found.variables).is_file()
