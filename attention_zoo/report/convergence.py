"""Whether trainings were long enough to tell mechanisms apart: what their own curves and their own reach say.

A mechanism that cannot see an answer stops learning without it, and that is its result; one that is still learning, or
misses what stands right before it, was ended too early, and nobody knows its result. Whose accuracy is so near to 100 %
that all it may still learn would be no difference, within the margin of equivalence, is not asked how its loss falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attention_zoo.report import rows as results
from attention_zoo.results.row import Row

LAST = 0.2
"""The share of a training's steps, at its end, in which its curve must be level."""
LEVEL = 0.02
"""Of all that a training's loss fell, at most, in `LAST`: as it goes on there, by a straight line."""
_POINTS = 3
"""Of a curve in `LAST`, below which nothing is said of it."""

_SURELY: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "window": lambda said: said["window"] if said.get("dilation", 1) == 1 else 0,
    "memory_length": lambda said: said["memory_length"],
    "window_blocks": lambda said: (said["window_blocks"] - 1) // 2 * said["block"],
}
"""Option -> how many tokens back a query sees for certain in one layer, by all options."""


def surely_seen(row: Row) -> int | None:
    """How far back every query of a trained mechanism sees every key in one layer; None where its options do not say.

    What only some queries see (hashed, drawn, learned or summed up) counts for nothing, nor does what layers hand on:
    recall by content goes one window far, however many layers there are.
    """
    said = results.options(row)
    for name, of in _SURELY.items():
        try:
            if isinstance(said.get(name), int) and (found := of(said)) > 0:
                return int(found)
        except (KeyError, TypeError):
            continue
    return None


def within_reach(rows: Sequence[Row]) -> tuple[float, int] | None:
    """The accuracy of runs of one mechanism where the answer lies within what it surely sees, and how far that is.

    None where a task does not tell its answers apart by their distance, or a mechanism not what it sees.
    """
    reach = next((far for row in rows if (far := surely_seen(row)) is not None), None)
    if reach is None:
        return None
    right = asked = 0.0
    for row in rows:
        for distance, accuracy, _, count in (row.get("by_group") or {}).get("distance", []):
            if 0 <= distance <= reach:
                right, asked = right + accuracy * count, asked + count
    return (right / asked, reach) if asked else None


def still_learning(rows: Sequence[Row]) -> float | None:
    """Which share of all that the training loss fell it fell in the last fifth of the steps: the mean over runs.

    None where no curve has points enough there, or no loss fell at all.
    """
    found = [share for row in rows if (share := _last_share(row.get("curve") or [])) is not None]
    return sum(found) / len(found) if found else None


def _last_share(curve: Sequence[Sequence[float]]) -> float | None:
    if not curve:
        return None
    end = curve[-1][0]
    last = [(step, loss) for step, loss in curve if step > (1 - LAST) * end]
    level = sum(loss for _, loss in last) / len(last)
    fell = max(loss for _, loss in curve) - level
    if len(last) < _POINTS or fell <= 0:
        return None
    middle = sum(step for step, _ in last) / len(last)
    slope = sum((step - middle) * loss for step, loss in last) / sum((step - middle) ** 2 for step, _ in last)
    return -slope * LAST * end / fell
