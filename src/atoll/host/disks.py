"""Making, growing and copying qcow2 files with qemu-img."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from atoll.errors import ProcessFailed, StorageFailed, from_os_error
from atoll.host import files, process
from atoll.host.facts import free_disk
from atoll.model.operation import Progress

LEAST_ROOM = 4 << 20
"""Bytes that have to be free for a new head. It takes a twentieth of that; the rest is for whoever runs already."""
_REFUSALS = (errno.ENOSPC, errno.EDQUOT)


async def create_head(path: Path, *, size: int, empty: Path) -> None:
    """A new writable head of `size` bytes, in place of one that was there.

    It is blank; what it stands on is told to QEMU by nodes, and not written in it. All blank heads of a size are the
    same, so the first one of each is kept in the folder `empty`, and copied: qemu-img alone would take a fifth of a
    fork's time. Raises `StorageFailed` when the disk is full, `ProcessFailed`.
    """
    doing = f"make the disk {path}"
    if free_disk(path.parent) < LEAST_ROOM:
        raise from_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), doing)
    kept = empty / f"{size}.qcow2"
    try:
        if not kept.exists():
            await _create(path, size, doing)
            with contextlib.suppress(StorageFailed):
                files.make_folder(empty)
                files.write_atomically(kept, path.read_bytes())
            return
        path.unlink(missing_ok=True)
        shutil.copyfile(kept, path)
        path.chmod(0o600)
    except OSError as error:
        raise from_os_error(error, doing) from error


async def _create(path: Path, size: int, doing: str) -> None:
    path.unlink(missing_ok=True)
    options = ["-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=off"]
    await _run(["qemu-img", "create", "-q", *options, "--", path, str(size)], doing)


def chain_argument(layers: Sequence[Path], *, shared: bool = False) -> str:
    """A chain of layers, the lowest first, as qemu-img takes it. What the files say of each other isn't looked at.

    A `shared` one is only read, and may be of a VM that runs and writes it.
    """
    node: dict[str, object] | None = None
    for path in layers:
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": node}
    if shared and node is not None:
        node |= {"read-only": True, "force-share": True}
    return f"json:{json.dumps(node)}"


async def allocated_ranges(layers: Sequence[Path], *, above: int) -> list[tuple[int, int]]:
    """Where the uppermost `above` layers of a chain have content of their own: offset and length, in order.

    Raises `ProcessFailed`.
    """
    if above == 0:
        return []
    found = await process.run(["qemu-img", "map", "--output=json", chain_argument(layers, shared=True)])
    return [
        (extent["start"], extent["length"])
        for extent in json.loads(found.stdout)
        # What no layer has reads as zeros, and is told as if the lowest had it.
        if extent["depth"] < above and extent["present"]
    ]


async def copy_content(layers: Sequence[Path], path: Path, *, size: int, report: Callable[[Progress], None]) -> None:
    """A new disk of `size` bytes with the content of a chain and nothing below it, in place of one that was there.

    Raises as `create_head` does.
    """
    path.unlink(missing_ok=True)
    await _run(
        ["qemu-img", "convert", "-p", "-t", "none", "-O", "qcow2", chain_argument(layers), path],
        f"copy the disk {path}",
        on_output=lambda output: _percent(output, report),
    )
    await resize(path, size)


async def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file with its holes, sharing its blocks where the file system can. Raises as `create_head`."""
    await _run(["cp", "--sparse=always", "--reflink=auto", "--", source, target], f"write {target}")


def _percent(output: bytes, report: Callable[[Progress], None]) -> None:
    """qemu-img writes `    (12.34/100%)` and a carriage return, again and again."""
    found = re.findall(rb"\(([\d.]+)/100%\)", output)
    if found:
        report(Progress(step="copy the disk", done=float(found[-1]), total=100, unit="percent"))


async def resize(path: Path, size: int) -> None:
    """Grow a head that no QEMU has open. `size` is the whole new size in bytes. Raises as `create_head` does."""
    # Without what is below it, which may have been merged into another file since the head was made.
    await _run(["qemu-img", "resize", "-q", "--", chain_argument([path]), str(size)], f"grow the disk {path}")


class Checked(Struct, frozen=True, kw_only=True):
    """What qemu-img says of one file's own tables."""

    corruptions: int = 0
    leaks: int = 0
    """Clusters that are taken and hold nothing: harmless, but for the room."""
    why: str = ""
    """Why it couldn't look, or its last words about what is damaged."""


async def check(path: Path, *, mend_leaks: bool = False) -> Checked:
    """Look whether a qcow2 file, without what is below it, is whole. Raises `MissingTool`.

    With `mend_leaks` the file is written, and nothing of its content is lost; nobody may have it open then.
    """
    how = ["-r", "leaks"] if mend_leaks else ["-U"]
    finished = await process.run(
        ["qemu-img", "check", "--output=json", *how, chain_argument([path])],
        env={"LC_ALL": "C"},
        check=False,
        # There may be a line for each cluster; with this only the last ones are kept.
        on_line=lambda line: None,
    )
    last = finished.stderr.decode(errors="replace").strip().splitlines()[-1:]
    try:
        said = json.loads(finished.stdout)
    except ValueError:
        return Checked(corruptions=1, why=last[0].replace(chain_argument([path]), path.name) if last else "")
    left = 0 if mend_leaks else int(said.get("leaks", 0))
    return Checked(
        corruptions=int(said.get("corruptions", 0)) + int(said.get("check-errors", 0)),
        leaks=left,
        why=last[0] if last else "",
    )


async def _run(words: list[str | Path], doing: str, *, on_output: Callable[[bytes], None] | None = None) -> None:
    """A program that writes a file; that it found no room is told as that."""
    try:
        await process.run(words, env={"LC_ALL": "C"}, on_output=on_output)
    except ProcessFailed as error:
        if (refusal := no_room(error.why)) is not None:
            raise from_os_error(refusal, doing) from error
        raise


def no_room(said: str) -> OSError | None:
    """What the system refused a program that writes, if its words are about that."""
    return next((OSError(number, os.strerror(number)) for number in _REFUSALS if os.strerror(number) in said), None)
