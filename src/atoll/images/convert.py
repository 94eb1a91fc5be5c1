"""Turn a checked image file into a frozen-to-be qcow2 layer, with qemu-img on a short leash.

qemu-img gets the file as an open descriptor: no odd name can be taken for a protocol or an option, and the file that
was checked is the file that is read. Its driver is named, its backing file is none, and limits end it should a crafted
file make it run on: processor time, memory, the size of what it writes, and the clock.
"""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

from atoll.errors import ImageRefused, from_os_error
from atoll.host import process
from atoll.images import qcow2
from atoll.images.formats import Inspection
from atoll.images.made import Report
from atoll.images.source import SourceFile, digest, opened
from atoll.model.image import Layer
from atoll.model.names import new_id
from atoll.model.operation import Progress
from atoll.model.units import GIB, MIB, format_duration, format_size

MAX_EXPANSION = 100
"""How many times bigger than its file the content of a disk may be. Compressed images come to 20 at most."""
USUAL_EXPANSION = 20
BASE_SIZE, BASE_TIME = 64 * MIB, 60.0
SLOWEST = 4 * MIB
"""Bytes a second that even a loaded machine with a slow disk converts."""
ADDRESS_SPACE = 4 * GIB
"""Bytes. qemu-img reserves 8 MiB of stack for each of up to 64 threads, and its caches are bounded by QEMU."""
REPAIR = "Copy or download it again, or repair a copy of it: `qemu-img check -r all FILE`."
CHECKED_FORMATS = frozenset({"qcow2", "vdi", "vmdk", "vhdx"})
"""Those whose tables `qemu-img check` can follow."""
_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")


def size_bound(source: SourceFile, virtual_size: int) -> int:
    """The most bytes that the layer may have: the disk, but not absurdly more than what is stored in the source."""
    content = min(virtual_size, _stored(source) * MAX_EXPANSION) + BASE_SIZE
    return content + content // 64


def time_bound(source: SourceFile, virtual_size: int) -> float:
    """Seconds after which reading and converting the file is given up."""
    return BASE_TIME + min(virtual_size, _stored(source) * USUAL_EXPANSION) / SLOWEST


def _stored(source: SourceFile) -> int:
    """Bytes of the file without its holes."""
    return min(source.size, os.fstat(source.descriptor).st_blocks * 512)


async def to_layer(source: SourceFile, found: Inspection, *, folder: Path, report: Report) -> tuple[Path, Layer]:
    """A qcow2 layer in `folder` with the content of a checked disk image.

    Raises `ImageRefused` for a damaged file or a bomb, `StorageFailed` when the disk is full.
    """
    if found.format in CHECKED_FORMATS:
        await _check(source, found)
    layer_id = new_id()
    target = folder / f"{layer_id}.qcow2"
    # No `-t none`: O_DIRECT isn't there on every file system, and who moves the file into its place syncs it.
    arguments = ["convert", "-p", "-O", "qcow2", "-o", "compat=1.1,lazy_refcounts=off", "--", _node(source, found)]

    def tell(output: bytes) -> None:
        if percent := _PERCENT.findall(output):
            report(Progress(step="convert", done=float(percent[-1]), total=100, unit="percent"))

    finished = await _run_limited([*arguments, target], source=source, found=found, on_output=tell)
    if finished.exit_code != 0:
        raise _failure(finished, source, found)
    with opened(target) as layer:
        size = qcow2.virtual_size(layer)
        sha256 = await digest(layer, report=report, step="verify")
        return target, Layer(id=layer_id, virtual_size=size, file_size=layer.size, sha256=sha256)


def _node(source: SourceFile, found: Inspection) -> str:
    file = {"driver": "file", "filename": f"/dev/fd/{source.descriptor}"}
    node: dict[str, object] = {"driver": found.format, "file": file}
    if found.format in ("qcow2", "vmdk"):
        node["backing"] = None
    return f"json:{json.dumps(node)}"


async def _check(source: SourceFile, found: Inspection) -> None:
    """Let QEMU follow all tables: a cut file would else read as zeros."""
    finished = await _run_limited(["check", "-q", "--", _node(source, found)], source=source, found=found)
    # 3: clusters are lost, which harms nobody. 63: this format can't be checked.
    if finished.exit_code not in (0, 3, 63):
        raise _failure(finished, source, found)


async def _run_limited(
    arguments: list[str | Path],
    *,
    source: SourceFile,
    found: Inspection,
    on_output: Callable[[bytes], None] | None = None,
) -> process.Finished:
    seconds = int(time_bound(source, found.virtual_size))
    limits = [
        f"--cpu={seconds}",
        f"--as={ADDRESS_SPACE}",
        f"--fsize={size_bound(source, found.virtual_size)}",
        "--core=0",
    ]
    return await process.run(
        ["prlimit", *limits, process.find("qemu-img"), *arguments],
        # Each thread's arena would else reserve address space of its own.
        env={"LC_ALL": "C", "MALLOC_ARENA_MAX": "2"},
        pass_fds=[source.descriptor],
        check=False,
        on_output=on_output,
    )


def _failure(finished: process.Finished, source: SourceFile, found: Inspection) -> Exception:
    lines = finished.stderr.decode(errors="replace").strip().splitlines()
    said = "; ".join(lines[-3:]).replace(_node(source, found), source.name) or f"exit code {finished.exit_code}"
    if os.strerror(errno.ENOSPC) in said:
        return from_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"convert {source.name}")
    if finished.exit_code == -signal.SIGXFSZ or os.strerror(errno.EFBIG) in said:
        bound = format_size(size_bound(source, found.virtual_size))
        return source.refused(f"its content is over {bound}, too much for a file of {format_size(source.size)}")
    if finished.exit_code == -signal.SIGXCPU:
        return too_slow(source, found)
    if 'Failed to get shared "write" lock' in said:
        return source.refused("another program is writing to it", "Stop the VM that uses it, then try again.")
    return source.refused(f"QEMU can't read it as {found.format} ({said})", REPAIR)


def too_slow(source: SourceFile, found: Inspection) -> ImageRefused:
    """The error of a file that took longer than `time_bound`."""
    bound = format_duration(time_bound(source, found.virtual_size))
    return source.refused(
        f"it takes more than {bound} to read", "Convert it with `qemu-img convert`, then import that."
    )
