"""Copy files and folders into and out of the guest, as tar streams through a command there.

As `cp -a` does: into a folder that exists, else under the name that was given. Modes, links and times (whole seconds)
are kept; what comes into the guest belongs to root there, what comes out belongs to the caller. Sockets and devices
are left out.
"""

import posixpath
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from atoll.errors import AtollError, GuestFailed, InvalidInput, NotFound, StorageFailed, from_os_error
from atoll.model.operation import Progress
from atoll.model.vm import ExecRequest, ExecResult
from atoll.operations.guest_slot import SH
from atoll.operations.guest_tar import Extraction, archive, total_size

Report = Callable[[Progress], None]
Execute = Callable[..., Awaitable[ExecResult]]
"""Runs a command in the guest: `guest_exec.execute` without its first two arguments, here or over there."""

MISSING, NOT_A_FOLDER, NO_TAR = 44, 45, 46

# $1: the destination; $2: the source's name; $3: `file` or `folder`; $4: a name for what isn't finished.
_PUT = """
command -v tar >/dev/null || exit 46
case $1 in
*/) [ -d "$1" ] || exit 45; to=${1%/}/$2;;
*) if [ -d "$1" ]; then to=$1/$2; else to=$1; fi;;
esac
parent=${to%/*}
[ "$parent" != "$to" ] || parent=.
[ -d "${parent:-/}" ] || { echo "no such folder: ${parent:-/}" >&2; exit 44; }
if [ "$3" = folder ]; then
    [ ! -e "$to" ] || [ -d "$to" ] || { echo "$to isn't a folder" >&2; exit 45; }
    mkdir -p "$to" && exec tar -xpf - -C "$to"
fi
[ ! -d "$to" ] || { echo "$to is a folder" >&2; exit 45; }
part=$parent/.$4
mkdir "$part" || exit 1
trap 'rm -rf "$part"' EXIT
trap 'exit 1' HUP INT TERM
tar -xpf - -C "$part" && mv -f "$part/x" "$to"
"""

_GET = """
command -v tar >/dev/null || exit 46
[ -e "$1" ] || [ -L "$1" ] || exit 44
if [ -d "$1" ] && { [ ! -L "$1" ] || [ "${1%/}" != "$1" ]; }; then
    size=$(du -sk "$1" 2>/dev/null)
    printf 'folder %s\\n' "$((${size%%[!0-9]*} * 1024))"
    cd "$1" && exec tar -cf - .
fi
size=0
[ -L "$1" ] || [ ! -f "$1" ] || size=$(wc -c <"$1") || exit 1
printf 'file %s\\n' "$((size))"
parent=${1%/*}
[ "$parent" != "$1" ] || parent=.
cd "${parent:-/}" && exec tar -cf - "./${1##*/}"
"""


async def copy_to(execute: Execute, name: str, source: Path, destination: str, *, report: Report | None = None) -> None:
    """Copy a file or folder of the host into the guest. `destination` is an absolute path there.

    A single file appears whole or not at all. Raises `NotFound`, `InvalidInput`, `StorageFailed`, `GuestFailed`.
    """
    _check(destination)
    what = f"{name}: can't copy {source} to {destination}"
    try:
        # `folder/.` and `folder/..` have no name of their own.
        source = source if source.name not in ("", "..") else source.resolve()
        total = total_size(source)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {source}", next_step="Check its path.") from error
    except OSError as error:
        raise from_os_error(error, f"read {source}") from error
    folder = source.is_dir() and not source.is_symlink()
    words = (destination, source.name, "folder" if folder else "file", f"atoll-{secrets.token_hex(6)}")
    request = ExecRequest(argv=(SH, "-c", _PUT, "sh", *words))

    async def content() -> AsyncIterator[bytes]:
        done = 0
        async for data in archive(source):
            yield data
            done += len(data)
            if report:
                report(Progress(step="copy", done=min(done, total), total=total, unit="bytes"))

    result = await execute(request, stdin=content())
    _examine(result, what, missing=f"the folder of {destination} isn't in the guest")


async def copy_from(
    execute: Execute, name: str, source: str, destination: Path, *, report: Report | None = None
) -> None:
    """Copy a file or folder of the guest to the host. `source` is an absolute path there.

    Whatever the guest sends, nothing is written outside the destination; it appears when all of it has come. Raises
    `NotFound`, `InvalidInput`, `StorageFailed` and `GuestFailed`.
    """
    _check(source)
    base = posixpath.basename(posixpath.normpath(source))
    target = destination / base if destination.is_dir() and base not in ("", "/") else destination
    if not target.parent.is_dir():
        raise NotFound(f"there is no folder {target.parent}", next_step="Make it first.")
    what = f"{name}: can't copy {source} to {destination}"
    extraction = Extraction(target, report=report)
    try:
        request = ExecRequest(argv=(SH, "-c", _GET, "sh", source))
        result = await execute(request, on_stdout=extraction.feed, drain=extraction.drain)
        _examine(result, what, missing=f"there is no {source} in the guest")
        await extraction.finish()
    except OSError as error:
        raise from_os_error(error, f"write {target}") from error
    except AtollError:
        # The guest's tar fails too when ours has: ours knows why.
        extraction.raise_failure()
        raise
    finally:
        await extraction.close()


def _check(path: str) -> None:
    if not path.startswith("/"):
        raise InvalidInput(f"{path!r} can't be a path in the guest", "it isn't absolute", "Begin it with a slash.")


def _examine(result: ExecResult, what: str, *, missing: str) -> None:
    if result.exit_code == 0:
        return
    said = "; ".join(result.stderr.decode(errors="replace").strip().splitlines()[-3:])
    if result.exit_code == MISSING:
        raise NotFound(what, missing)
    if result.exit_code == NOT_A_FOLDER:
        raise InvalidInput(what, said or "the destination isn't a folder")
    if result.exit_code == NO_TAR:
        raise GuestFailed(what, "the guest has no tar program", "Install tar in the guest.")
    if "No space left" in said:
        raise StorageFailed(what, "the guest's disk is full", "Free some space there, or `atoll disk resize`.")
    raise GuestFailed(what, said or f"exit code {result.exit_code}")
