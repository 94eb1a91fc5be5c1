"""The first-boot seed: a NoCloud ISO image that cloud-init reads.

Format: cloud-init's documentation of the NoCloud datasource: a volume labelled CIDATA with `meta-data` and `user-data`.
"""

import io
import re
from pathlib import Path
from typing import Any

import pycdlib
import yaml

from atoll.errors import InvalidInput
from atoll.host import process
from atoll.host.files import write_atomically
from atoll.model.spec import SeedSpec

# useradd's own rule: lower case, at most 32.
_USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
_KEY = re.compile(r"(?:ssh|ecdsa|sk)-[\w@.-]+ [A-Za-z0-9+/=]+(?: [^\n\r]*)?")
_USER_DATA_STARTS = ("#", "Content-Type:", "MIME-Version:", "From ")
DEFAULT_USER = "atoll"
"""Whom keys and a password are for when no user was named."""


def write_seed(path: Path, *, seed: SeedSpec, hostname: str, instance_id: str, install_agent: bool) -> None:
    """Write the seed to `path` as a whole. `instance_id` tells cloud-init a copy from a reboot.

    `install_agent` has the guest install and start the QEMU guest agent, for images without it. It has no effect
    beside the user's own user data, which is taken as it is. Raises `InvalidInput`, `StorageFailed`.
    """
    meta_data = yaml.safe_dump({"instance-id": instance_id, "local-hostname": hostname}, sort_keys=True)
    if seed.user_data is not None:
        user_data = check_user_data(seed.user_data)
    else:
        user_data = _cloud_config(seed, install_agent=install_agent)
    write_atomically(path, _iso({"meta-data": meta_data.encode(), "user-data": user_data.encode()}))


def check_user_data(text: str) -> str:
    """The text itself when cloud-init can tell what it is. Raises `InvalidInput`."""
    if "\0" in text:
        raise InvalidInput("the user data is no text", "it has zero bytes", "Give a text file: #cloud-config or #!…")
    if text.strip() and not text.startswith(_USER_DATA_STARTS):
        raise InvalidInput(
            "cloud-init wouldn't know what the user data is",
            f"it starts with {text.splitlines()[0][:40]!r}",
            "Start it with #cloud-config, with #!/bin/sh, or make it a MIME multi-part message.",
        )
    if text.startswith("#cloud-config"):
        _check_cloud_config(text)
    return text


def _check_cloud_config(text: str) -> None:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInput("the user data is no valid #cloud-config", " ".join(str(error).split())) from error
    if content is not None and not isinstance(content, dict):
        raise InvalidInput("the user data is no valid #cloud-config", "it is not a set of `key: value` lines")


def _cloud_config(seed: SeedSpec, *, install_agent: bool) -> str:
    config: dict[str, Any] = {}
    if not seed.empty:
        config["users"] = [_user(seed)]
        config["ssh_pwauth"] = seed.password_hash is not None
    if install_agent:
        config["package_update"] = True
        config["packages"] = ["qemu-guest-agent"]
        # Its name is the same everywhere; on systems with systemd it starts with its device only after the next boot.
        config["runcmd"] = [
            ["sh", "-c", "systemctl enable --now qemu-guest-agent || rc-service qemu-guest-agent start"]
        ]
    return "#cloud-config\n" + yaml.safe_dump(config, sort_keys=True, allow_unicode=True)


def _user(seed: SeedSpec) -> dict[str, Any]:
    name = seed.user or DEFAULT_USER
    if not _USER_NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} can't be the name of a user",
            "it has up to 32 lower-case letters, digits, '_' and '-', and starts with a letter",
            "Choose another with --user.",
        )
    for key in seed.ssh_keys:
        if not _KEY.fullmatch(key.strip()):
            raise InvalidInput(
                f"{key[:40]!r} is no SSH public key", next_step="Give the content of a file like ~/.ssh/id_ed25519.pub."
            )
    user: dict[str, Any] = {"name": name, "shell": "/bin/bash", "lock_passwd": seed.password_hash is None}
    if name != "root":
        user["sudo"] = "ALL=(ALL) NOPASSWD:ALL"
    if seed.ssh_keys:
        user["ssh_authorized_keys"] = [key.strip() for key in seed.ssh_keys]
    if seed.password_hash is not None:
        # Unlike `passwd`, this also sets the password of a user that the image has already.
        user["hashed_passwd"] = seed.password_hash
    return user


def _iso(files: dict[str, bytes]) -> bytes:
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="CIDATA")
    try:
        for name, content in files.items():
            plain = name.upper().replace("-", "_")
            image.add_fp(io.BytesIO(content), len(content), f"/{plain}.;1", rr_name=name, joliet_path=f"/{name}")
        out = io.BytesIO()
        image.write_fp(out)
        return out.getvalue()
    finally:
        image.close()


async def hash_password(plain: str) -> str:
    """The SHA-512 crypt hash (`$6$…`) of a password, with a new salt. Raises `InvalidInput`, `MissingTool`."""
    if not plain or "\n" in plain or "\0" in plain:
        raise InvalidInput("this can't be a password", "it is empty, or has a line break or a zero byte in it")
    # From standard input, so that no other user sees it in the list of processes.
    finished = await process.run(["openssl", "passwd", "-6", "-stdin"], stdin=plain.encode() + b"\n")
    return finished.text.strip()
