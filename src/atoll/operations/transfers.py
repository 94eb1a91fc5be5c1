"""Files that travel in pieces: uploads until they are used, and bundles until they are downloaded.

Each is a folder among the unfinished files, which outlives the agent; nobody comes back to one that is idle for long.
"""

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from atoll.errors import ImageRefused, InvalidInput, NotFound, TooMany, WrongState, from_os_error
from atoll.host import facts, files
from atoll.host.files import CHUNK
from atoll.images.source import in_thread, progress_teller, shown, write_at
from atoll.layout import Layout
from atoll.model.names import new_id
from atoll.model.transfer import Upload, UploadRequest
from atoll.operations.services import Report

UPLOAD_IDLE = 24 * 3600.0
BUNDLE_IDLE = 3600.0
"""Seconds after which nobody is expected to go on."""
PRUNED_IDLE = 600.0
"""The same for `atoll prune`, which somebody asks for who wants the room."""
MOST_UPLOADS = 1000
_KINDS = {"upload": UPLOAD_IDLE, "bundle": BUNDLE_IDLE}
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


def is_awaited(path: Path, *, pruning: bool = False) -> bool:
    """Whether an unfinished folder is a transfer that somebody may still go on with."""
    limit = _KINDS.get(path.name.partition("-")[0])
    if limit is None:
        return False
    newest = 0.0
    with contextlib.suppress(OSError):
        newest = max(each.stat().st_mtime for each in (path, *path.iterdir()))
    return time.time() - newest < (PRUNED_IDLE if pruning else limit)


def sweep(layout: Layout) -> None:
    """Remove the transfers that nobody goes on with; sooner where they would fill the disk."""
    for kind in _KINDS:
        for path in layout.temporary.glob(f"{kind}-*"):
            if not is_awaited(path) or (_is_full(layout) and not is_awaited(path, pruning=True)):
                shutil.rmtree(path, ignore_errors=True)


def _is_full(layout: Layout) -> bool:
    """Whether little but the disk's reserve is left."""
    return facts.free_disk(layout.temporary) < 2 * facts.disk_reserve(layout.temporary)


def _check_room(layout: Layout, size: int, *, what: str) -> None:
    folder = files.make_folder(layout.temporary)
    facts.check_room(folder, size, what=what, reserve=facts.disk_reserve(folder))


def begin_upload(layout: Layout, request: UploadRequest) -> Upload:
    """Raises `StorageFailed` when the disk has no room for all of it, `TooMany`."""
    sweep(layout)
    if sum(1 for _ in layout.temporary.glob("upload-*")) >= MOST_UPLOADS:
        raise TooMany(
            f"{MOST_UPLOADS} uploads wait to be used", next_step="Use some of them, or drop them: `atoll prune`."
        )
    _check_room(layout, request.size, what="the file")
    upload_id = new_id()
    paths = layout.transfer("upload", upload_id)
    files.make_folder(paths.folder)
    files.write_atomically(paths.about, msgspec.json.encode(request))
    paths.content.touch(mode=0o600)
    return find_upload(layout, upload_id)


def find_upload(layout: Layout, upload_id: str) -> Upload:
    """Raises `NotFound`."""
    paths = layout.transfer("upload", upload_id)
    try:
        if not _ID.fullmatch(upload_id):
            raise FileNotFoundError
        about = msgspec.json.decode(paths.about.read_bytes(), type=UploadRequest)
        offset = paths.content.stat().st_size
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no upload {shown(upload_id)!r}", "it was used, or idle for a day", "Begin it anew."
        ) from error
    return Upload(id=upload_id, size=about.size, offset=offset, sha256=about.sha256, name=about.name)


def append(layout: Layout, upload: Upload, piece: bytes) -> Upload:
    """Write the next piece. Raises `InvalidInput` for more than was announced, `StorageFailed`."""
    after = upload.offset + len(piece)
    if after > upload.size:
        raise InvalidInput(
            "the file is larger than was said", f"it was to have {upload.size} bytes", "Begin an upload of its size."
        )
    is_data = bool(piece.strip(b"\0"))
    if is_data:
        _check_room(layout, len(piece), what="the next piece of the file")
    try:
        descriptor = os.open(layout.transfer("upload", upload.id).content, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if is_data:
                write_at(descriptor, piece, upload.offset)
            else:
                os.ftruncate(descriptor, after)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise from_os_error(error, "store the file") from error
    return msgspec.structs.replace(upload, offset=after)


async def whole_upload(layout: Layout, upload_id: str, report: Report | None) -> tuple[Path, Upload]:
    """The file of an upload, once it is what it has to be. Raises `NotFound`, `WrongState`, `ImageRefused`."""
    upload = find_upload(layout, upload_id)
    if upload.offset < upload.size:
        raise WrongState(
            f"the upload {upload_id} isn't whole", f"{upload.offset} of {upload.size} bytes are here", "Send the rest."
        )
    path = layout.transfer("upload", upload_id).content
    if upload.sha256 is not None:
        tell = progress_teller(report or (lambda _: None), step="check", total=upload.size)
        found = await in_thread(lambda look: _digest(path, look, tell))
        if found != upload.sha256:
            raise ImageRefused(
                "the file that came isn't the one that was announced",
                f"its SHA-256 is {found}, not {upload.sha256}",
                "It was altered on the way, or while it was read: send it again.",
            )
    return path, upload


def _digest(path: Path, look: Callable[[], None], tell: Callable[[int], None]) -> str:
    digest, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                look()
                digest.update(piece)
                done += len(piece)
                tell(done)
    except OSError as error:
        raise from_os_error(error, "read the file") from error
    return digest.hexdigest()


def drop(layout: Layout, kind: str, transfer_id: str) -> None:
    """Remove what came, or what waits; fine when it is gone."""
    if _ID.fullmatch(transfer_id):
        shutil.rmtree(layout.transfer(kind, transfer_id).folder, ignore_errors=True)


def new_bundle(layout: Layout) -> str:
    """A folder for a bundle; its id. Raises `StorageFailed` when the disk is nearly full."""
    sweep(layout)
    _check_room(layout, 0, what="a bundle")
    bundle_id = new_id()
    files.make_folder(layout.transfer("bundle", bundle_id).folder)
    return bundle_id


def find_bundle(layout: Layout, bundle_id: str) -> tuple[Path, int]:
    """A bundle that waits, with its size. Raises `NotFound`."""
    path = layout.transfer("bundle", bundle_id).content
    try:
        if not _ID.fullmatch(bundle_id):
            raise FileNotFoundError
        # Whoever reads it now may come again.
        os.utime(path)
        return path, path.stat().st_size
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no bundle {shown(bundle_id)!r}", "it was fetched, or idle for an hour", "Export it again."
        ) from error
