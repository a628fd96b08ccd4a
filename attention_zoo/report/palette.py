"""One colour for each mechanism, in every chart of every report, and a look of its own for each line.

A colour belongs to a mechanism's name: the shipped ones have theirs by a table, and any other by a digest of its name,
so that no report ever repaints one. What else is drawn beside it changes marker and dash alone, so that a sweep over
one mechanism's options stays in its colour and no two lines look alike. Markers differ too: the page can be read
without colour vision.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

PAIRS = (
    ("#2b6fd6", "#5b97f2"), ("#e37400", "#f7a541"), ("#1aa387", "#4ccfb0"), ("#9a1f4f", "#d2608d"),
    ("#5ea8f0", "#9cc8ff"), ("#7a5c00", "#b8962e"), ("#6a3fd0", "#a98bf0"), ("#7f8f1f", "#b3c24a"),
    ("#00808f", "#4dc8d8"), ("#d8407f", "#ff8cb8"), ("#3f7f35", "#86c97a"), ("#8a4b2a", "#d39b78"),
    ("#c5483c", "#f5877c"), ("#a352c4", "#d79bf0"), ("#b28a00", "#e6c64d"), ("#56718a", "#9cb4c9"),
)  # fmt: skip
"""Colours of the light theme and their dark partners. The first four differ by at least 20 (CIE Lab) from each other
and from ink in normal, protanope and deuteranope vision."""
INK = ("#20242a", "#e6e8eb")
MARKERS = ("circle", "square", "diamond", "triangle-up", "hexagon", "triangle-down", "star", "cross")
DASHES = ("solid", "dashdot", "dash", "dot")

KNOWN = {
    "longformer": 0, "reformer": 1, "bigbird": 2, "transformer_xl": 3, "block_recurrent": 4, "compressive": 5,
    "h_transformer_1d": 6, "memory_compressed": 7, "memory_tokens": 8, "adaptive_span": 9, "hierarchical": 10,
    "hourglass": 11, "global_tokens": 12, "longformer_sinks": 13, "memory_in_front": 14, "funnel": 15,
}  # fmt: skip
"""Name -> its place among `PAIRS`. A place once given is never given to another."""


class Style(NamedTuple):
    """How a line looks: a colour of the light theme and its dark partner, a plotly marker symbol, a plotly dash."""

    color: str
    dark: str
    marker: str
    dash: str = "solid"


BASELINE = {
    "full (materialised)": Style(*INK, "circle-open", "dot"),
    "full (fused)": Style(*INK, "square-open", "dash"),
    "full": Style(*INK, "square-open", "dash"),
}


def place(name: str) -> int:
    """The place of a mechanism's colour among `PAIRS`: a function of its name alone."""
    return KNOWN.get(name, zlib.crc32(name.encode()) % len(PAIRS))


def styles(lines: Mapping[str, str]) -> dict[str, Style]:
    """A style for each line of a report; full attention, the baseline, is in ink.

    Args:
        lines: name of a line ("longformer (window=64)") -> its mechanism ("longformer").
    """
    looks = [(marker, dash) for dash, marker in product(DASHES, MARKERS)]
    found: dict[str, Style] = {}
    taken: set[tuple[str, str, str]] = set()
    for name in sorted(lines, key=lambda name: (name != lines[name], name)):  # who stands alone has the plain look
        backend = lines[name]
        if name in BASELINE:
            found[name] = BASELINE[name]
            continue
        color, dark = INK if backend == "full" else PAIRS[place(backend)]
        home = place(backend) % len(MARKERS)
        mine = [looks[(home + step) % len(looks)] for step in range(len(looks))]
        marker, dash = next((look for look in mine if (color, *look) not in taken), mine[0])
        taken.add((color, marker, dash))
        found[name] = Style(color, dark, marker, dash)
    return found
