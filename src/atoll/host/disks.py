"""Making and growing qcow2 heads with qemu-img."""

from pathlib import Path

from atoll.host import process


async def create_head(path: Path, *, size: int, layer: Path | None) -> None:
    """A new writable head of `size` bytes, an overlay on a frozen layer or blank, in place of one that was there.

    Raises `ProcessFailed`, also when the disk is full.
    """
    path.unlink(missing_ok=True)
    below = [] if layer is None else ["-b", str(layer), "-F", "qcow2"]
    # -u: the layer is ours and needn't be opened; QEMU gets the chain by node anyway.
    await process.run(
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-u",
            "-o",
            "compat=1.1,lazy_refcounts=off",
            *below,
            "--",
            path,
            str(size),
        ]
    )


async def resize(path: Path, size: int) -> None:
    """Grow a head that no QEMU has open. `size` is the whole new size in bytes."""
    await process.run(["qemu-img", "resize", "-q", "-f", "qcow2", "--", path, str(size)])
