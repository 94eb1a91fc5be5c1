"""The catalogue of official images, and what a user's own file changes in it."""

from pathlib import Path

import pytest

from atoll.errors import InvalidInput, NotFound
from atoll.images import catalogue
from atoll.layout import Layout
from atoll.model.names import check_image_name

NOTHING = Path("/nonexistent/catalogue.yaml")


def test_every_entry_can_be_pulled_as_it_is_written() -> None:
    entries = catalogue.entries(NOTHING)
    assert len({(entry.name, entry.arch) for entry in entries}) == len(entries)
    for entry in entries:
        assert check_image_name(entry.name) == entry.name
        for address in (entry.url, entry.checksums):
            assert address.startswith("https://")
            assert "{" not in address
        assert entry.arch == "x86_64" or entry.firmwares == ("uefi",)


def test_the_promised_systems_are_there() -> None:
    names = {entry.name.partition(":")[0] for entry in catalogue.entries(NOTHING)}
    assert names == {"debian", "ubuntu", "fedora", "alpine", "rocky", "arch", "freebsd"}


def test_the_list_for_people_has_each_name_once_with_its_machines(tmp_path: Path) -> None:
    lines = catalogue.described(Layout(data=tmp_path, cache=tmp_path, run=tmp_path))
    assert len(dict(lines)) == len(lines)
    assert dict(lines)["debian:12"] == "pull: Debian 12, official cloud image (x86_64, aarch64)"


def test_a_name_without_a_version_is_the_newest() -> None:
    assert catalogue.find("debian", arch="x86_64", additions=NOTHING).name == "debian:13"
    assert catalogue.find("ubuntu", arch="riscv64", additions=NOTHING).name == "ubuntu:24.04"


def test_a_version_that_is_not_published_for_that_machine_is_told() -> None:
    with pytest.raises(NotFound, match="only for x86_64"):
        catalogue.find("arch", arch="riscv64", additions=NOTHING)


def test_a_misspelt_name_brings_the_right_one() -> None:
    with pytest.raises(NotFound, match=r"Did you mean .*debian:12"):
        catalogue.find("debain:12", arch="x86_64", additions=NOTHING)


def test_users_add_images_and_give_publishers_other_addresses(tmp_path: Path) -> None:
    file = tmp_path / "catalogue.yaml"
    file.write_text(
        "publishers: {debian: 'https://images.example.org/debian/'}\n"
        "images: [{name: 'corp:1', arch: x86_64, url: '{debian}/corp.qcow2', checksums: 'https://example.org/SUMS'}]\n"
    )
    debian = catalogue.find("debian:12", arch="x86_64", additions=file)
    assert debian.url.startswith("https://images.example.org/debian/bookworm/latest/")
    assert catalogue.find("corp", arch="x86_64", additions=file).url == "https://images.example.org/debian/corp.qcow2"


@pytest.mark.parametrize("content", ["publishers: [1, 2]", "imagez: []", "{{{", "\x00"])
def test_a_bad_catalogue_file_is_told_by_its_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "catalogue.yaml"
    file.write_text(content)
    with pytest.raises(InvalidInput, match=r"catalogue\.yaml can't be used"):
        catalogue.entries(file)
