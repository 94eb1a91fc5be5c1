"""What a maker of images (build, pull, import) hands over: files in its own folder, and the records to be.

A maker writes only into the folder it was given. `operations/images.py` moves the files to their last names and records
them; until then nothing of the maker's work can be seen, and removing the folder undoes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from atoll.model.image import Image, Layer
from atoll.model.operation import Progress

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Made:
    """A finished image: `layers` are qcow2 files without a backing file, `blobs` plain files with their SHA-256."""

    image: Image
    layers: tuple[tuple[Path, Layer], ...] = ()
    blobs: tuple[tuple[Path, str], ...] = ()
