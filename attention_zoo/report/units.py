"""Numbers as people read them: three significant figures, binary bytes, units always said."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

NONE = "–"
"""What stands where there is no figure."""


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant figures without an exponent: 0.0123, 1.23, 123, 12,300."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def seconds(value: float | None) -> str:
    """Seconds as s, ms or µs; from two minutes on as min."""
    if value is None:
        return NONE
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        if value < limit:
            return f"{significant(value * factor)} {unit}"
    return f"{significant(value / 60)} min"


def size(value: float | None) -> str:
    """Bytes as B, KiB, MiB, GiB or TiB (powers of 1,024)."""
    if value is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{significant(value)} {unit}"
        value /= 1024
    return f"{significant(value)} TiB"


def whole(said: str) -> str:
    """A round figure without its zeros after the point, for axes: 1.00 GiB becomes 1 GiB."""
    return re.sub(r"\.0+(?!\d)", "", said)


def count(value: float | None) -> str:
    """Whole numbers with thousands separated."""
    return NONE if value is None else f"{round(value):,}"


def millions(value: float | None) -> str:
    """Parameter counts: 812 k, 1.23 M."""
    if value is None:
        return NONE
    for limit, factor, unit in ((1e3, 1.0, ""), (1e6, 1e3, " k"), (1e9, 1e6, " M")):
        if value < limit:
            return f"{significant(value / factor)}{unit}"
    return f"{significant(value / 1e9)} G"


def percent(share: float | None) -> str:
    """A share between 0 and 1 with one decimal."""
    return NONE if share is None else f"{100 * share:.1f} %"


def listed(parts: Sequence[str]) -> str:
    """Several in one sentence: a, b and c."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def fixed(value: float | None, places: int = 2) -> str:
    return NONE if value is None else f"{value:,.{places}f}"


def log_ticks(low: float, high: float, *, binary: bool, most: int = 7) -> list[float]:
    """Round values for a logarithmic axis over [low, high]: at most `most`, never two alike when written.

    Binary axes step by powers of two (1, 2, 4, ... or sparser), the others by 1-3-10 or whole decades.
    """
    if binary:
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        step = next(s for s in range(1, 64) if (last - first) / s <= most - 1)
        return [2.0**e for e in range(first - first % step, last + step, step)]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if 2 * (last - first) + 1 <= most:
        return [m * 10.0**e for e in range(first, last + 1) for m in (1, 3)]
    step = next(s for s in range(1, 64) if (last - first) / s <= most - 1)
    return [10.0**e for e in range(first - first % step, last + step, step)]
