"""Files read from file systems that mke2fs makes; debugfs is the judge."""

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.host.ext_files import ROOT, ExtFiles
from atoll.host.partitions import Read, partitions
from atoll.operations.diff_disks import merged, without
from atoll.operations.diff_files import changed_files

MIB = 1 << 20


def tool(*words: str | Path, stdin: str = "") -> str:
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = subprocess.run([str(word) for word in words], input=stdin, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def reader(path: Path) -> Read:
    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise ValueError("beyond the end")
        return data

    return read


def listing(files: ExtFiles) -> dict[str, tuple[int, int, str]]:
    """Path to mode, size and digest (or target) of every file."""
    found: dict[str, tuple[int, int, str]] = {}
    stack = [("", ROOT)]
    while stack:
        path, number = stack.pop()
        for name, inner in files.folder(files.inode(number)).items():
            inode, at = files.inode(inner), f"{path}/{name.decode()}"
            content = ""
            if inode.is_folder:
                stack.append((at, inner))
            elif stat.S_ISLNK(inode.mode):
                content = files.target(inode).decode()
            elif stat.S_ISREG(inode.mode):
                content = hashlib.sha256(b"".join(files.content(inode))[: inode.size]).hexdigest()
            found[at] = (inode.mode, 0 if inode.is_folder else inode.size, content)
    return found


def listing_of(folder: Path) -> dict[str, tuple[int, int, str]]:
    found = {}
    for path in folder.rglob("*"):
        status, content = path.lstat(), ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        at = f"/{path.relative_to(folder)}"
        found[at] = (status.st_mode, 0 if stat.S_ISDIR(status.st_mode) else status.st_size, content)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of many kinds: a folder with an index, a hole, long and short links, content over many blocks."""
    tree = tmp_path / "tree"
    (tree / "many/deep/deeper").mkdir(parents=True)
    for number in range(1500):
        (tree / f"many/a-name-that-is-rather-long-{number}").write_text(str(number))
    (tree / "big").write_bytes(os.urandom(3 * MIB))
    with (tree / "hole").open("wb") as file:
        file.seek(9 * MIB)
        file.write(b"end")
    (tree / "short").symlink_to("big")
    (tree / "long").symlink_to("x" * 200)
    os.mkfifo(tree / "pipe")
    (tree / "many/deep/deeper/naïve \n name").write_text("")
    return tree


@pytest.fixture
def make(tree: Path, tmp_path: Path) -> Callable[..., Path]:
    def made(kind: str, *options: str) -> Path:
        image = tmp_path / f"{kind}.img"
        image.unlink(missing_ok=True)
        tool("mke2fs", "-q", "-F", "-t", kind, *options, "-d", tree, image, "48M")
        return image

    return made


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ext2", ("-b", "1024")),
        ("ext3", ("-I", "128")),
        ("ext4", ("-b", "1024", "-O", "64bit")),
        ("ext4", ("-b", "4096", "-O", "^64bit,^metadata_csum")),
    ],
)
def test_files_are_read_as_they_were_written(
    make: Callable[..., Path], tree: Path, kind: str, options: tuple[str, ...]
) -> None:
    files = ExtFiles(reader(make(kind, *options)))
    assert files.kind == kind
    found = listing(files)
    del found["/lost+found"]
    assert found == listing_of(tree)
    assert changed_files(files, files, contents=True) == []


@pytest.mark.parametrize("version", ["", "-c -v 2", "-c -v 3"])
def test_what_only_the_journal_has_is_read_from_it(make: Callable[..., Path], tmp_path: Path, version: str) -> None:
    image = make("ext4", "-b", "1024")
    empty = listing(ExtFiles(reader(image)))
    # A copy in which names are gone is where the new content of blocks comes from.
    later = tmp_path / "later.img"
    shutil.copy(image, later)
    tool("debugfs", "-w", "-f", "-", later, stdin="rm /big\nunlink /short\nmkdir /new\n")
    before, after = image.read_bytes(), later.read_bytes()
    numbers = [at // 1024 for at in range(0, len(before), 1024) if before[at : at + 1024] != after[at : at + 1024]]
    # The head of the file system is written anew when the journal is.
    numbers = [number for number in numbers if number > 1]
    blocks = tmp_path / "blocks"
    blocks.write_bytes(b"".join(after[number * 1024 :][:1024] for number in numbers))
    script = f"jo {version}\njw -b {','.join(map(str, numbers))} {blocks}\njc\n"
    tool("debugfs", "-w", "-f", "-", image, stdin=script)
    replayed = tmp_path / "replayed.img"
    shutil.copy(image, replayed)
    tool("debugfs", "-w", "-R", "journal_run", replayed)
    found = listing(ExtFiles(reader(image)))
    assert found == listing(ExtFiles(reader(replayed)))
    assert empty.keys() - found.keys() == {"/big", "/short"}
    assert found.keys() - empty.keys() == {"/new"}


def test_what_is_damaged_or_unknown_is_refused_and_never_endless(make: Callable[..., Path], tmp_path: Path) -> None:
    image = make("ext4", "-b", "1024")
    whole = image.read_bytes()
    with pytest.raises(ValueError, match="no ext2"):
        ExtFiles(lambda offset, length: bytes(length))
    tool("mke2fs", "-q", "-F", "-t", "ext4", "-O", "meta_bg,^resize_inode", tmp_path / "odd.img", "8M")
    with pytest.raises(ValueError, match="aren't known"):
        ExtFiles(reader(tmp_path / "odd.img"))
    for seed in range(60):
        at = 1024 + int.from_bytes(hashlib.sha256(bytes([seed])).digest()[:3]) % (1 * MIB)
        damaged = whole[:at] + hashlib.sha256(bytes([seed])).digest() * 8 + whole[at + 256 :]
        path = tmp_path / "damaged.img"
        path.write_bytes(damaged)
        try:
            changed_files(ExtFiles(reader(path)), ExtFiles(reader(image)), contents=False)
        except ValueError:
            continue


def test_partitions_are_found_in_both_kinds_of_tables(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    for label, expected in (
        ("gpt", {1: (MIB, MIB), 15: (2 * MIB, 4 * MIB)}),
        ("dos", {1: (MIB, MIB), 3: (2 * MIB, 4 * MIB)}),
    ):
        second = 15 if label == "gpt" else 3
        disk.write_bytes(bytes(8 * MIB))
        tool(
            "sfdisk",
            "-q",
            disk,
            stdin=f"label: {label}\n{disk}1: start=2048, size=2048\n{disk}{second}: start=4096, size=8192\n",
        )
        assert partitions(reader(disk)) == expected
    disk.write_bytes(bytes(4096))
    assert partitions(reader(disk)) == {}
    disk.write_bytes(b"")
    assert partitions(reader(disk)) == {}


def test_ranges_are_put_together_and_taken_away() -> None:
    assert merged([(10, 5), (0, 4), (4, 2), (12, 1)]) == [(0, 6), (10, 5)]
    assert without([(0, 10), (20, 10)], [(2, 3), (8, 15)]) == [(0, 2), (5, 3), (23, 7)]
    assert without([(0, 10), (20, 10)], [(0, 40)]) == []
    assert without([(0, 10)], []) == [(0, 10)]
    assert without([(5, 5), (10, 5), (30, 2)], [(0, 6), (12, 1), (31, 9)]) == [(6, 4), (10, 2), (13, 2), (30, 1)]
