"""One colour and one marker per backend, in every chart of every report, readable without colour vision.

A backend's place is a function of its name alone, so that adding one never repaints the others (unless two names ask
for the same place: then the later in the alphabet moves on). Where several lines of one backend stand together, each
has a look of its own, by its whole name. Figures are written in light colours; the page swaps them
for their dark partners, so that one figure serves both.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

INK, MUTED, GRID, PAPER, BLANK = "#20242a", "#69717c", "#e4e7eb", "#fefefe", "#f4f6f8"
"""Text, secondary text, grid lines, chart background, unseen cells; light theme."""

_DARK = {INK: "#e6e8eb", MUTED: "#98a1ad", GRID: "#2b3038", PAPER: "#171a1f", BLANK: "#1f242b"}

# Light and dark partners. The first four differ by at least 20 (CIE Lab) from each other and from ink in normal,
# protanope and deuteranope vision; the rest is told apart by its marker too.
_PAIRS = (
    ("#2b6fd6", "#5b97f2"),
    ("#e37400", "#f7a541"),
    ("#1aa387", "#4ccfb0"),
    ("#9a1f4f", "#d2608d"),
    ("#5ea8f0", "#9cc8ff"),
    ("#7a5c00", "#b8962e"),
    ("#6a3fd0", "#a98bf0"),
    ("#7f8f1f", "#b3c24a"),
)
_MARKERS = ("circle", "square", "diamond", "triangle-up", "hexagon", "triangle-down", "star", "cross")
_DASHES = ("solid", "dashdot", "dash", "dot")
_SALT = "790"  # chosen so that the mechanisms shipped at first take the four most distinct places

DARK = {**_DARK, **dict(_PAIRS)}
"""Light colour -> its dark partner, for the page."""


class Style(NamedTuple):
    """How a backend looks: a colour of the light theme, a plotly marker symbol, a plotly dash."""

    color: str
    marker: str
    dash: str = "solid"


BASELINE = {"dense": Style(INK, "circle-open", "dot"), "sdpa": Style(INK, "square-open", "dash")}
FULL = Style(INK, "square-open", "dash")


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for every backend, or name of a line ("longformer (window=64)"); `full`, the baseline, is in ink.

    No two are alike: a further round through the colours has other markers and dashes.
    """
    taken: dict[int, int] = {}
    found = {"full": FULL}
    for name in sorted(set(names) - {"full"}, key=lambda name: (name.endswith(")"), name)):
        home = place(name)
        fullness = min((taken.get(slot, 0) for slot in range(len(_PAIRS))), default=0)
        slot = next(
            s % len(_PAIRS) for s in range(home, home + len(_PAIRS)) if taken.get(s % len(_PAIRS), 0) <= fullness
        )
        taken[slot] = taken.get(slot, 0) + 1
        marker = _MARKERS[(slot + fullness) % len(_MARKERS)]
        found[name] = Style(_PAIRS[slot][0], marker, _DASHES[(fullness + fullness // len(_MARKERS)) % len(_DASHES)])
    return found


def pick(styles: Mapping[str, Style], *names: str) -> Style:
    """The style of the first of several names that has one: a line's own, or its backend's."""
    return next(styles[name] for name in names if name in styles)


def place(name: str) -> int:
    """The slot that a name asks for."""
    return zlib.crc32(f"{_SALT}{name}".encode()) % len(_PAIRS)
