"""Sizes and times as people write them: `512MiB`, `10G`, `50ms`, `2m`."""

import math
import re

from atoll.errors import InvalidInput

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4

# A bare letter means the binary unit, as QEMU, docker and Incus read it; `kB`, `MB` … are decimal as SI says.
_SIZE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": TIB, "tib": TIB, "tb": 1000**4,
}  # fmt: skip
_TIME_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def _parse(text: str, units: dict[str, float] | dict[str, int], example: str, kind: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in units:
        raise InvalidInput(f"'{text}' is not a {kind}", next_step=f"Write it like {example}.")
    quantity = float(match[1]) * units[match[2].lower()]
    if not math.isfinite(quantity):
        raise InvalidInput(f"'{text[:20]}…' is too large for a {kind}", next_step=f"Write it like {example}.")
    return quantity


def parse_size(text: str | int) -> int:
    """Bytes from `512MiB`, `10G` (GiB), `1.5g` or a plain number of bytes. Raises `InvalidInput`."""
    if isinstance(text, int):
        return text
    return int(_parse(text, _SIZE_UNITS, "512MiB or 10GiB", "size"))


def format_size(size: float) -> str:
    """`536870912` → `512MiB`; at most one decimal."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + unit
    return f"{int(size)}B"


def parse_duration(text: str | float) -> float:
    """Seconds from `50ms`, `30s`, `2m`, `1h` or a plain number of seconds. Raises `InvalidInput`."""
    if isinstance(text, int | float):
        return float(text)
    return _parse(text, _TIME_UNITS, "50ms, 30s or 2m", "time")


def format_duration(seconds: float) -> str:
    """`0.05` → `50ms`, `90` → `1m30s`, `93784` → `1d2h`: at most two units."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 10:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    while parts[0][0] == 0:
        parts.pop(0)
    return "".join(f"{count}{unit}" for count, unit in parts[:2] if count)
