"""Which files differ between two file systems.

Compared are type, mode, owner, size, time of the last change of the content, a link's target and a device's numbers. Of
folders only mode and owner: the rest follows from what is in them. Where two files of the same size have other times,
their contents are read, and times alone make a file differ too. Not compared: extended attributes, and which names are
of the same file.
"""

import stat
from collections.abc import Iterator

from atoll.host.ext_files import ROOT, ExtFiles, Inode
from atoll.model.difference import Aspect, FileDifference, FileKind

LARGEST_CONTENT = 256 << 20
"""Bytes of a file whose content is read; a larger one goes by its times."""
_KINDS: dict[int, FileKind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "device",
    stat.S_IFCHR: "device",
}


def changed_files(old: ExtFiles, new: ExtFiles, *, contents: bool) -> list[FileDifference]:
    """The files that differ, by path. `contents`: read those of the same size and another time.

    Raises `ValueError` when one of the two can't be read, `OSError`.
    """
    found: list[FileDifference] = []
    stack: list[tuple[bytes, Inode | None, Inode | None]] = [(b"", old.inode(ROOT), new.inode(ROOT))]
    seen: set[tuple[bool, int]] = set()
    while stack:
        path, before, after = stack.pop()
        names_before, names_after = _names(old, before, seen, False), _names(new, after, seen, True)
        for name in sorted(names_before.keys() | names_after.keys()):
            left = old.inode(names_before[name]) if name in names_before else None
            right = new.inode(names_after[name]) if name in names_after else None
            inner = path + b"/" + name
            found += _difference(inner, (old, left), (new, right), contents=contents)
            if (left is not None and left.is_folder) or (right is not None and right.is_folder):
                stack.append((inner, left, right))
    return sorted(found, key=lambda each: each.path)


def _names(files: ExtFiles, inode: Inode | None, seen: set[tuple[bool, int]], new: bool) -> dict[bytes, int]:
    if inode is None or not inode.is_folder:
        return {}
    if (new, inode.number) in seen:
        raise ValueError("a folder is in two places: it is damaged, or just being written")
    seen.add((new, inode.number))
    return files.folder(inode)


def _difference(
    path: bytes, old: tuple[ExtFiles, Inode | None], new: tuple[ExtFiles, Inode | None], *, contents: bool
) -> Iterator[FileDifference]:
    before, after = old[1], new[1]
    text = path.decode(errors="backslashreplace")
    if before is not None and after is not None:
        aspects = tuple(_aspects((old[0], before), (new[0], after), contents=contents))
        if aspects:
            yield FileDifference(
                change="modified",
                path=text,
                kind=_kind(after),
                old_size=_size(before),
                new_size=_size(after),
                aspects=aspects,
            )
    elif after is not None:
        yield FileDifference(change="added", path=text, kind=_kind(after), new_size=_size(after))
    elif before is not None:
        yield FileDifference(change="removed", path=text, kind=_kind(before), old_size=_size(before))


def _kind(inode: Inode) -> FileKind:
    kind = _KINDS.get(stat.S_IFMT(inode.mode))
    if kind is None:
        raise ValueError("a name without a file: it is damaged, or just being written")
    return kind


def _size(inode: Inode) -> int | None:
    return inode.size if stat.S_ISREG(inode.mode) else None


def _aspects(old: tuple[ExtFiles, Inode], new: tuple[ExtFiles, Inode], *, contents: bool) -> Iterator[Aspect]:
    before, after = old[1], new[1]
    if stat.S_IFMT(before.mode) != stat.S_IFMT(after.mode):
        yield "type"
        return
    if before.mode != after.mode:
        yield "mode"
    if before.owner != after.owner:
        yield "owner"
    match _kind(after):
        case "file":
            yield from _of_files(old, new, contents=contents)
        case "link":
            if old[0].target(before) != new[0].target(after):
                yield "target"
        case "device":
            if before.block != after.block:
                yield "target"


def _of_files(old: tuple[ExtFiles, Inode], new: tuple[ExtFiles, Inode], *, contents: bool) -> Iterator[Aspect]:
    before, after = old[1], new[1]
    if before.size != after.size:
        yield "size"
        return
    if before.modified != after.modified:
        yield "time"
    # Whoever writes a file can set its time back, but not that of the last change to its inode.
    if (before.modified, before.changed) != (after.modified, after.changed) and contents:
        if after.size > LARGEST_CONTENT:
            if before.modified == after.modified:
                yield "time"
        elif not _same_content(old, new):
            yield "content"


def _same_content(old: tuple[ExtFiles, Inode], new: tuple[ExtFiles, Inode]) -> bool:
    (files, before), (others, after) = old, new
    left = after.size
    if files.block_size != others.block_size:
        return b"".join(files.content(before))[:left] == b"".join(others.content(after))[:left]
    for one, other in zip(files.content(before), others.content(after), strict=False):
        if one[:left] != other[:left]:
            return False
        left -= min(left, len(one))
    return True
