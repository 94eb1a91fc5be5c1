"""File systems and RAM disks made without root hold what was put in, owned by root, the same bytes each time."""

import subprocess
from pathlib import Path

import pytest

from atoll.images import ext4
from atoll.images.ext4 import Tree, make_ext4
from atoll.images.modules import ModuleSet, find_modules, without_signature
from atoll.model.units import MIB

IDENTITY = "3ea11738-01e3-5986-8dbc-415ad1eb105c"


def tree(order: int = 1) -> Tree:
    made = Tree(time=1_700_000_000)
    adding = [
        lambda: made.file("/etc/grüße", "hello\n", 0o640),
        lambda: made.file("/usr/bin/program", b"\x7fELF" + bytes(5000), 0o4755),
        lambda: made.link("/bin", "usr/bin"),
        lambda: made.folder("/tmp", 0o1777),
    ]
    for add in adding[::order]:
        add()
    return made


def ask(image: Path, question: str) -> str:
    return subprocess.run(["/usr/sbin/debugfs", "-R", question, image], capture_output=True, text=True).stdout


async def make(folder: Path, name: str) -> Path:
    tree().write_tar(folder / f"{name}.tar")
    image = folder / f"{name}.raw"
    await make_ext4(folder / f"{name}.tar", image, size=64 * MIB, label="root", identity=IDENTITY, time=1_700_000_000)
    return image


async def test_a_file_system_holds_the_files_with_their_modes_and_root_as_owner(tmp_path: Path) -> None:
    image = await make(tmp_path, "one")
    assert ask(image, "cat /etc/grüße") == "hello\n"
    program = ask(image, "stat /usr/bin/program")
    assert "Mode:  04755" in program and "User:     0   Group:     0" in program
    assert 'Fast link dest: "usr/bin"' in ask(image, "stat /bin")
    assert "Mode:  01777" in ask(image, "stat /tmp")
    subprocess.run(["/usr/sbin/e2fsck", "-fn", image], check=True, capture_output=True)


async def test_the_same_files_give_the_same_file_system(tmp_path: Path) -> None:
    one, two = await make(tmp_path, "one"), await make(tmp_path, "two")
    assert one.read_bytes() == two.read_bytes()


async def test_a_file_system_takes_little_room_on_the_disk(tmp_path: Path) -> None:
    image = await make(tmp_path, "one")
    assert image.stat().st_size == 64 * MIB
    assert image.stat().st_blocks * 512 < 2 * MIB


async def test_a_file_system_lies_at_its_offset_and_nothing_else_is_touched(tmp_path: Path) -> None:
    tree().write_tar(tmp_path / "tar")
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * MIB + bytes(65 * MIB))
    await make_ext4(tmp_path / "tar", disk, size=64 * MIB, label="root", identity=IDENTITY, time=1, offset=MIB)
    assert disk.read_bytes()[:MIB] == b"x" * MIB
    assert disk.stat().st_size == 66 * MIB
    part = tmp_path / "part"
    part.write_bytes(disk.read_bytes()[MIB : 65 * MIB])
    assert ask(part, "cat /etc/grüße") == "hello\n"


async def test_an_older_mke2fs_gets_a_folder_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 1.47.1 mke2fs refuses an archive; here a wrapper refuses it in the same words."""
    wrapper = tmp_path / "bin" / "mke2fs"
    wrapper.parent.mkdir()
    wrapper.write_text(
        '#!/bin/sh\nfor word; do case $word in *.tar) echo "mke2fs: Not a directory while populating" >&2; exit 1;; '
        'esac; done\nexec /usr/sbin/mke2fs "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/sbin:/usr/bin:/bin")
    image = await make(tmp_path, "old")
    assert ask(image, "cat /etc/grüße") == "hello\n"
    assert "Mode:  04755" in ask(image, "stat /usr/bin/program")
    assert "User:     0   Group:     0" in ask(image, "stat /etc/grüße")
    assert not (tmp_path / "old.folder").exists()


def test_a_ram_disk_has_the_files_in_order() -> None:
    entries = read_cpio(tree().cpio())
    assert entries["etc/grüße"] == (0o100640, b"hello\n")
    assert entries["bin"] == (0o120777, b"usr/bin")
    assert entries["usr/bin/program"][0] == 0o104755
    assert list(entries) == sorted(entries)


def test_the_order_in_which_files_are_added_does_not_matter() -> None:
    assert tree(1).cpio() == tree(-1).cpio()


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    entries, place = {}, 0
    while True:
        assert archive[place : place + 6] == b"070701"
        fields = [int(archive[place + 6 + 8 * n : place + 14 + 8 * n], 16) for n in range(13)]
        mode, uid, size, name_size = fields[1], fields[2], fields[6], fields[11]
        name = archive[place + 110 : place + 110 + name_size - 1].decode()
        start = (place + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return entries
        assert uid == 0
        entries[name] = (mode, archive[start : start + size])
        place = (start + size + 3) & ~3


async def test_modules_come_with_what_they_need_in_loading_order(tmp_path: Path) -> None:
    def module(name: str, info: bytes) -> None:
        (tmp_path / name).write_bytes(b"\x7fELF\0" + info + b"\0")

    module("virtio_net.ko", b"alias=virtio:d00000001v*\0depends=net-failover,failover")
    module("net-failover.ko", b"depends=failover")
    module("failover.ko", b"depends=")
    module("unrelated.ko", b"depends=")
    chosen = ModuleSet(find_modules(tmp_path))
    await chosen.add("virtio_net")
    await chosen.add("built_into_the_kernel")
    assert list(chosen.contents) == ["failover", "net_failover", "virtio_net"]
    index = chosen.index()
    assert index["modules.dep"].splitlines()[-1] == "virtio_net.ko: net_failover.ko failover.ko"
    assert index["modules.alias"] == "alias virtio:d00000001v* virtio_net\n"


def test_a_signature_is_taken_off_a_module() -> None:
    signature = b"S" * 700
    descriptor = bytes(8) + len(signature).to_bytes(4, "big")
    signed = b"module" + signature + descriptor + b"~Module signature appended~\n"
    assert without_signature(signed) == b"module"
    assert without_signature(b"module") == b"module"


async def test_a_full_disk_is_told_and_not_taken_for_an_old_mke2fs(tmp_path: Path) -> None:
    tree().write_tar(tmp_path / "tar")
    with pytest.raises(ext4.ProcessFailed, match="mke2fs failed"):
        await make_ext4(tmp_path / "tar", tmp_path / "image", size=60 * 1024, label="x", identity=IDENTITY, time=1)
