"""The kernel's merging of equal pages (KSM): switched on and put back, and what came of it.

Names and meanings are those of Documentation/admin-guide/mm/ksm.rst. Pages of the guests' memory are offered by QEMU
(`mem-merge` of its machine); nothing else of QEMU's is.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from atoll.errors import InvalidInput, Unsupported
from atoll.host import facts, files

KSM = Path("/sys/kernel/mm/ksm")
PAGES_TO_SCAN = 500
"""At each of 50 rounds a second, where the kernel doesn't choose by itself: 100 MB/s, about a tenth of a processor."""
_KEPT = ("advisor_mode", "pages_to_scan", "run")
"""In the order in which they are put back: leaving the advisor makes the kernel forget `pages_to_scan`."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Note(Struct, frozen=True, kw_only=True):
    """What was there before we changed it. Settings end with the boot."""

    boot_id: str
    settings: dict[str, str]


class Merged(Struct, frozen=True, kw_only=True):
    """What merging does now, for all programs of the computer."""

    on: bool
    saved: int
    """Bytes that are free for it."""
    share_saved: float
    """Of each merged page, in the mean, what is free for it: of eight equal pages one stays, so it is 7/8."""


@contextlib.contextmanager
def merging(note: Path, *, wanted: bool, folder: Path = KSM) -> Iterator[str]:
    """Equal pages are merged as long as this holds, if `wanted`; says what was done, if anything.

    What somebody who was killed here left on is put back first. Where it is on already, it is left alone.
    Raises `InvalidInput` or `Unsupported` when it can't be.
    """
    left = put_back(note, folder=folder)
    if not wanted:
        yield "the kernel's page merging is as it was before an agent that was killed" if left else ""
        return
    _check(folder)
    if _read(folder / "run") == "1":
        yield "the kernel merges equal pages already; its settings are left as they are"
        return
    try:
        _switch_on(note, folder)
        yield ""
    finally:
        put_back(note, folder=folder)


def put_back(note: Path, *, folder: Path = KSM) -> bool:
    """Give the settings back that `note` tells; whether there were any. What is merged stays so until it is written."""
    try:
        noted = msgspec.json.decode(note.read_bytes(), type=_Note)
    except (OSError, msgspec.DecodeError):
        note.unlink(missing_ok=True)
        return False
    ours = noted.boot_id == facts.boot_id()
    if ours:
        for name in _KEPT:
            if name in noted.settings:
                with contextlib.suppress(OSError):
                    (folder / name).write_text(noted.settings[name])
    note.unlink(missing_ok=True)
    return ours


def _check(folder: Path) -> None:
    if not (folder / "run").exists():
        raise Unsupported(
            "this computer's kernel can't merge equal pages",
            f"there is no {folder}",
            "Leave --merge-pages away, or use a kernel with CONFIG_KSM.",
        )
    if not os.access(folder / "run", os.W_OK):
        raise InvalidInput(
            "this agent may not switch page merging on",
            f"{folder} is written by root only, outside of containers",
            "Leave --merge-pages away, or let root run `atoll serve --merge-pages`.",
        )


def _switch_on(note: Path, folder: Path) -> None:
    settings = {name: _selected(text) for name in _KEPT if (text := _read(folder / name)) is not None}
    content = msgspec.json.encode(_Note(boot_id=facts.boot_id(), settings=settings))
    files.make_folder(note.parent)
    # Before anything is changed: whoever is killed in between leaves nothing behind that nobody knows of.
    files.write_atomically(note, content)
    if "advisor_mode" in settings:
        # It scans as fast as the amount of memory asks for, within bounds that the computer's owner can set.
        (folder / "advisor_mode").write_text("scan-time")
    else:
        (folder / "pages_to_scan").write_text(str(max(PAGES_TO_SCAN, int(settings["pages_to_scan"]))))
    (folder / "run").write_text("1")


def _selected(text: str) -> str:
    """Of a setting that lists its values, `[none] scan-time`, the one that holds."""
    _, bracket, rest = text.partition("[")
    return rest.partition("]")[0] if bracket else text


def merged(folder: Path = KSM) -> Merged:
    """A reading of now; nothing, where the kernel can't merge."""
    shared, sharing, zeros = (
        int(_read(folder / name) or 0) for name in ("pages_shared", "pages_sharing", "ksm_zero_pages")
    )
    return Merged(
        on=_read(folder / "run") == "1",
        saved=(sharing + zeros) * _PAGE,
        share_saved=sharing / (shared + sharing) if sharing else 0.0,
    )


def merged_of(pid: int, proc: Path = facts.PROC) -> int:
    """Bytes of a process that are merged with equal ones, of its own or of others; 0 when that isn't known."""
    # Without a Path: there may be hundreds of VMs.
    try:
        with open(f"{proc}/{pid}/ksm_merging_pages", "rb") as file:  # noqa: PTH123
            return int(file.read()) * _PAGE
    except (OSError, ValueError):
        return 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
