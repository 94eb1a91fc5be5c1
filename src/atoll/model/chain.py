"""Which layers of a chain to merge, so that it stays short. Pure."""

from collections.abc import Collection, Sequence

from atoll.model.image import Layer

LONGEST = 8
"""Layers below a head; a longer chain is merged."""
AFTER = 5
"""Layers of a chain after it was merged: some room, so that not every further snapshot makes it too long."""


def window_to_merge(chain: Sequence[Layer], needed: Collection[str]) -> tuple[int, int] | None:
    """The first and the last index of the layers to merge into one; None for a chain that is short enough.

    `chain` has the oldest layer first. The window that costs least is taken: its bytes are written once more, and those
    of layers in `needed`, which others stand on and which stay beside the new one, take room twice.
    """
    if len(chain) <= LONGEST:
        return None
    length = len(chain) - AFTER + 1

    def cost(start: int) -> int:
        window = chain[start : start + length]
        below = window[:-1]  # whoever stands on the last one stands on the new layer afterwards
        return sum(layer.file_size for layer in window) + sum(each.file_size for each in below if each.id in needed)

    start = min(range(len(chain) - length + 1), key=lambda index: (cost(index), -index))
    return start, start + length - 1
