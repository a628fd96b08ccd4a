"""What a cell will need, judged from shorter ones: a cell that cannot fit is not run, and waiting has an end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attention_zoo import registry
from attention_zoo.measure.cell import SpeedCell

EXPONENT = {"constant": 0.0, "linear": 1.0, "loglinear": 1.1, "quadratic": 2.0}

Done = Sequence[tuple[SpeedCell, dict[str, Any]]]


def over_budget(cell: SpeedCell, done: Done, limit_bytes: int | None) -> str | None:
    """Why this cell would not fit, in one line; None where it may.

    A shorter cell of the same series that ran out of memory settles it. Otherwise the last two lengths of the series
    are extended as a power law (one length alone in proportion), and the L x L matrices of a materialised kernel are
    simply counted.
    """
    shorter = _shorter(cell, done)
    for earlier, row in shorter:
        if row["status"] in ("oom", "oom_predicted"):
            return f"predicted: {earlier.length} tokens did not fit either ({row['error']})"
    if limit_bytes is None:
        return None
    found = [(_matrices(cell), "scores and weights, both L x L")]
    measured = [(earlier.length, row["peak_bytes"]) for earlier, row in shorter if row["peak_bytes"]]
    if measured:
        lengths = " and ".join(str(length) for length, _ in measured[-2:])
        found.append((_extended(measured[-2:], cell.length), f"judged from {lengths} tokens"))
    most, why = max(found)
    if most <= limit_bytes:
        return None
    return f"predicted: {most / 2**30:.1f} GiB of tensors ({why}), over the limit of {limit_bytes / 2**30:.1f} GiB"


def too_slow(cell: SpeedCell, done: Done) -> str | None:
    """A time-out at a shorter length of the same series, in one line; None where there was none."""
    for earlier, row in _shorter(cell, done):
        if row["status"] == "timeout":
            return f"predicted: {earlier.length} tokens timed out already"
    return None


def expected_wall_s(cells: Sequence[SpeedCell], done: Done) -> float | None:
    """Seconds until these cells are through, from the `wall_seconds` of finished ones; None before there are any."""
    known = [(cell, row["wall_seconds"]) for cell, row in done if row.get("wall_seconds")]
    if not known:
        return None
    start = min(wall for _, wall in known)
    return sum(_expected(cell, known, start) for cell in cells)


def _expected(cell: SpeedCell, known: Sequence[tuple[SpeedCell, float]], start: float) -> float:
    same = [(earlier, wall) for earlier, wall in known if earlier.series() == cell.series()]
    if not same:
        near = [wall for earlier, wall in known if earlier.length == cell.length] or [wall for _, wall in known]
        return sum(near) / len(near)
    earlier, wall = max(same, key=lambda pair: pair[0].length)
    growth = EXPONENT[registry.recipe(cell.backend)[0].declared.compute]
    return start + (wall - start) * (cell.length / earlier.length) ** growth


def _shorter(cell: SpeedCell, done: Done) -> list[tuple[SpeedCell, dict[str, Any]]]:
    """Finished cells of the same series below this length, shortest first."""
    mine = [(each, row) for each, row in done if each.series() == cell.series() and each.length < cell.length]
    return sorted(mine, key=lambda pair: pair[0].length)


def _matrices(cell: SpeedCell) -> int:
    if cell.kernel != "dense" or cell.phase == "decode":
        return 0
    return 2 * cell.batch * cell.heads * cell.length**2 * getattr(torch, cell.dtype).itemsize


def _extended(points: Sequence[tuple[int, int]], length: int) -> int:
    (first, low), (last, high) = points[0], points[-1]
    exponent = 1.0 if first == last else math.log(high / low) / math.log(last / first)
    return round(high * (length / last) ** min(max(exponent, 0.0), 2.0))
