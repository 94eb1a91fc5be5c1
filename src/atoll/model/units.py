"""Sizes and times as people write them: `512MiB`, `10G`, `50ms`, `2m`."""

import re
from collections.abc import Mapping

from atoll.errors import InvalidInput

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4
_LARGEST = 2**63 - 1
"""JSON, SQLite and QEMU take no larger numbers."""

# A bare letter means the binary unit, as QEMU, docker and Incus read it; `kB`, `MB` … are decimal as SI says.
_SIZE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": TIB, "tib": TIB, "tb": 1000**4,
}  # fmt: skip
_MILLISECONDS = {"ms": 1, "": 1000, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_QUANTITY = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*([A-Za-z]*)\s*", re.ASCII)
_PARTS = re.compile(r"\d+[A-Za-z]+", re.ASCII)


def _refused(value: str | float, why: str, example: str) -> InvalidInput:
    # Python doesn't write thousands of decimal digits.
    text = hex(value) if isinstance(value, int) and abs(value) > _LARGEST else str(value)
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    return InvalidInput(f"'{shown}' is {why}", next_step=f"Write it like {example}.")


def _parse(text: str, units: Mapping[str, int], kind: str, example: str) -> tuple[int, int]:
    """The quantity in the smallest unit, as numerator and denominator: floats would lose bytes."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match[3].lower() not in units:
        raise _refused(text, f"not a {kind}", example)
    # More digits than these make no difference, and Python doesn't read thousands of them.
    whole, fraction = match[1].lstrip("0"), (match[2] or "")[:20]
    if len(whole) > 19:
        raise _refused(text, f"too large for a {kind}", example)
    numerator = int(f"0{whole}{fraction}") * units[match[3].lower()]
    denominator: int = 10 ** len(fraction)
    if numerator > _LARGEST * denominator:
        raise _refused(text, f"too large for a {kind}", example)
    return numerator, denominator


def parse_size(text: str | int) -> int:
    """Bytes from `512MiB`, `10G` (GiB), `1.5g` or a plain number of bytes. Raises `InvalidInput`."""
    example = "512MiB or 10GiB"
    if isinstance(text, int):
        if not 0 <= text <= _LARGEST:
            raise _refused(text, "not a size", example)
        return text
    numerator, denominator = _parse(text, _SIZE_UNITS, "size", example)
    return numerator // denominator


def format_size(size: float) -> str:
    """`536870912` → `512MiB`; at most one decimal."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # What would be 1024 of the next smaller unit, rounded, is one of this.
        if round(size / factor * 1024, 1) >= 1024:
            return f"{size / factor:.1f}".removesuffix(".0") + unit
    return f"{int(size)}B"


def parse_duration(text: str | float) -> float:
    """Seconds from `50ms`, `30s`, `2m`, `1m30s` or a plain number of seconds. Raises `InvalidInput`."""
    example = "50ms, 30s or 2m"
    if isinstance(text, int | float):
        if not 0 <= text <= _LARGEST:
            raise _refused(text, "not a time", example)
        return float(text)
    several = _PARTS.findall(text)
    parts = several if len(several) > 1 and "".join(several) == text.strip() else [text]
    quantities = [_parse(part, _MILLISECONDS, "time", example) for part in parts]
    return sum(numerator / (1000 * denominator) for numerator, denominator in quantities)


def format_duration(seconds: float) -> str:
    """`0.05` → `50ms`, `90` → `1m30s`, `93784` → `1d2h`: at most two units."""
    if round(seconds * 1000) < 1000:
        return f"{round(seconds * 1000)}ms"
    if seconds < 10:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    while parts[0][0] == 0:
        parts.pop(0)
    return "".join(f"{count}{unit}" for count, unit in parts[:2] if count)


def format_rate(rate: int) -> str:
    """Bytes a second as `10Mbit`; `none` for no limit."""
    if not rate:
        return "none"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if rate * 8 >= size:
            return f"{rate * 8 / size:.4g}{unit}bit"
    return f"{rate * 8}bit"
