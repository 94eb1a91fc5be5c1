"""Names of images in the SQLite records. Part of the caller's transaction."""

import sqlite3

import msgspec

from atoll.model.image import Image

_image = msgspec.json.Decoder(Image)
_encode = msgspec.json.Encoder().encode


def take(db: sqlite3.Connection, image: Image, names: list[str]) -> None:
    """Point the names at this image; one that loses its last name is shown by its id."""
    marks = ",".join("?" * len(names))
    losers = db.execute(
        f"SELECT DISTINCT image_id FROM image_names WHERE name IN ({marks}) AND image_id != ?", (*names, image.id)
    ).fetchall()
    for (loser_id,) in losers:
        loser = _image.decode(db.execute("SELECT record FROM images WHERE id = ?", (loser_id,)).fetchone()[0])
        first, *others = [name for name in (loser.name, *loser.tags) if name not in names] or [loser.short_id]
        loser = msgspec.structs.replace(loser, name=first, tags=tuple(others))
        db.execute("UPDATE images SET record = ? WHERE id = ?", (_encode(loser), loser_id))
    db.execute("DELETE FROM image_names WHERE image_id = ?", (image.id,))
    db.executemany("INSERT OR REPLACE INTO image_names VALUES (?, ?)", [(name, image.id) for name in names])
