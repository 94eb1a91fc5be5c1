"""Seeds hold what cloud-init expects, and refuse what it wouldn't understand."""

import io
from pathlib import Path

import pycdlib
import pytest
import yaml

from atoll.errors import InvalidInput, StorageFailed
from atoll.images.seed import hash_password, write_seed
from atoll.model.spec import SeedSpec

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJvYiBoYXMgYSBrZXkgb2YgaGlzIG93biBoZXJl bob@home"


def read_seed(path: Path) -> dict[str, str]:
    image = pycdlib.PyCdlib()
    image.open(str(path))
    try:
        assert image.pvd.volume_identifier.strip() == b"CIDATA"
        files = {}
        for name in ("meta-data", "user-data"):
            content = io.BytesIO()
            image.get_file_from_iso_fp(content, rr_path=f"/{name}")
            files[name] = content.getvalue().decode()
        return files
    finally:
        image.close()


def written(tmp_path: Path, seed: SeedSpec, *, install_agent: bool = False) -> dict[str, str]:
    path = tmp_path / "seed.iso"
    write_seed(path, seed=seed, hostname="web-1", instance_id="abc", install_agent=install_agent)
    return read_seed(path)


def test_the_seed_tells_host_name_and_instance(tmp_path: Path) -> None:
    files = written(tmp_path, SeedSpec())
    assert yaml.safe_load(files["meta-data"]) == {"instance-id": "abc", "local-hostname": "web-1"}
    assert files["user-data"].startswith("#cloud-config\n")
    assert not yaml.safe_load(files["user-data"]), "no user is made unless asked for"


def test_a_user_gets_keys_password_and_sudo(tmp_path: Path) -> None:
    files = written(tmp_path, SeedSpec(user="bob", password_hash="$6$salt$hash", ssh_keys=(KEY + "\n",)))
    config = yaml.safe_load(files["user-data"])
    assert config["ssh_pwauth"] is True
    assert config["users"] == [
        {
            "name": "bob",
            "shell": "/bin/bash",
            "lock_passwd": False,
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "ssh_authorized_keys": [KEY],
            "hashed_passwd": "$6$salt$hash",
        }
    ]


def test_keys_without_a_name_are_for_the_default_user_who_has_no_password(tmp_path: Path) -> None:
    (user,) = yaml.safe_load(written(tmp_path, SeedSpec(ssh_keys=(KEY,)))["user-data"])["users"]
    assert user["name"] == "atoll" and user["lock_passwd"] is True and "hashed_passwd" not in user


def test_the_agent_is_installed_where_the_image_has_none(tmp_path: Path) -> None:
    config = yaml.safe_load(written(tmp_path, SeedSpec(), install_agent=True)["user-data"])
    assert config["packages"] == ["qemu-guest-agent"]
    assert "qemu-guest-agent" in config["runcmd"][0][2]


@pytest.mark.parametrize(
    "data",
    [
        "#cloud-config\npackages: [nginx]\n",
        "#!/bin/sh\necho grüße 🐧\n",
        'Content-Type: multipart/mixed; boundary="x"\n\n--x--\n',
        "#include\nhttps://example.com/data\n",
        "",
    ],
)
def test_user_data_is_taken_as_it_is(tmp_path: Path, data: str) -> None:
    assert written(tmp_path, SeedSpec(user_data=data), install_agent=True)["user-data"] == data


@pytest.mark.parametrize(
    "seed",
    [
        SeedSpec(user_data="packages: [nginx]"),
        SeedSpec(user_data="#cloud-config\n{unclosed: ["),
        SeedSpec(user_data="#cloud-config\n- a\n- list\n"),
        SeedSpec(user_data="\0binary"),
        SeedSpec(user="Bob Smith"),
        SeedSpec(user="x" * 33),
        SeedSpec(ssh_keys=("-----BEGIN OPENSSH PRIVATE KEY-----",)),
        SeedSpec(ssh_keys=(f"{KEY}\n{KEY}",)),
    ],
)
def test_what_cloud_init_would_not_understand_is_refused_and_nothing_written(tmp_path: Path, seed: SeedSpec) -> None:
    with pytest.raises(InvalidInput):
        written(tmp_path, seed)
    assert not list(tmp_path.iterdir())


def test_a_seed_is_replaced_as_a_whole_and_is_private(tmp_path: Path) -> None:
    written(tmp_path, SeedSpec(user="bob"))
    assert yaml.safe_load(written(tmp_path, SeedSpec(user="eve"))["user-data"])["users"][0]["name"] == "eve"
    assert [path.name for path in tmp_path.iterdir()] == ["seed.iso"]
    assert (tmp_path / "seed.iso").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed):
        write_seed(tmp_path / "no" / "seed", seed=SeedSpec(), hostname="x", instance_id="x", install_agent=False)


async def test_a_password_is_hashed_with_a_salt_of_its_own() -> None:
    one, two = await hash_password("corréct horse"), await hash_password("corréct horse")
    assert one.startswith("$6$") and len(one) > 90
    assert one != two


@pytest.mark.parametrize("password", ["", "two\nlines", "zero\0byte"])
async def test_what_cannot_be_a_password_is_refused(password: str) -> None:
    with pytest.raises(InvalidInput):
        await hash_password(password)
