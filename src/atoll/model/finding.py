"""What `fsck` finds."""

from typing import Literal

from msgspec import Struct

Severity = Literal["error", "warning", "note"]


class Finding(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that is wrong, or could be better."""

    kind: str
    """For programs; stable: `layer-missing`, `mode`, `unneeded` …"""
    thing: str
    """For people: `VM web`, `layer 0123456789ab`."""
    detail: str
    severity: Severity
    affected: tuple[str, ...] = ()
    """Whoever needs what is lost: `VM web`, `snapshot web@clean`, `image debian:13`."""
    repair: str = ""
    """What `--repair` does about it; empty when it does nothing."""
    repaired: bool = False
    next_step: str = ""
    """What the reader can do."""

    @property
    def remains(self) -> bool:
        """Whether it is an error that is still there."""
        return self.severity == "error" and not self.repaired
