"""The notation of a shortened stack, `"2@1 8@3 2@1"`: layers @ factor against the input, from the first block on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from attention_zoo.rules import shown

PART = re.compile(r"(\d{1,4})@(\d{1,6})", re.ASCII)
MOST = 32
"""Parts of a layout."""


class Part(NamedTuple):
    """So many layers at one factor against the input."""

    layers: int
    factor: int


def parts_of(layout: Any, example: str) -> list[Part]:
    """The parts that a layout says. ValueError, with the example, for what is none."""
    found = [PART.fullmatch(word) for word in layout.split()] if isinstance(layout, str) else []
    parts = [Part(int(each[1]), int(each[2])) for each in found if each]
    right = len(parts) == len(found) and 1 < len(parts) <= MOST and all(part.layers and part.factor for part in parts)
    if not right or parts[0].factor != 1:
        raise ValueError(
            f"shorten must list 2 to {MOST} parts, layers@factor, the first at factor 1, as {example!r}, got "
            f"{shown(layout)}"
        )
    return parts


def check_descent(parts: Sequence[Part]) -> None:
    """Raise a ValueError unless each factor is a multiple of the one before, and larger."""
    for one, two in itertools.pairwise(parts):
        if two.factor <= one.factor or two.factor % one.factor:
            raise ValueError(
                f"shorten must go down by factors that are multiples of those before, got {two.factor} after "
                f"{one.factor} in {written(parts)!r}"
            )


def written(parts: Sequence[Part]) -> str:
    """The layout again."""
    return " ".join(f"{part.layers}@{part.factor}" for part in parts)
