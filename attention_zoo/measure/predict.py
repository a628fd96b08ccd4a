"""What a cell will need, judged from shorter ones: a cell that cannot fit is not run, and waiting has an end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attention_zoo import registry
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.results.row import Row

EXPONENT = {"constant": 0.0, "linear": 1.0, "loglinear": 1.1, "quadratic": 2.0}

Done = Sequence[tuple[SpeedCell, Row]]


class Excess(NamedTuple):
    """Why a cell would not fit, in one line, and how many bytes it would take, as far as one can tell."""

    why: str
    predicted_bytes: int | None


def over_budget(cell: SpeedCell, done: Done, limit_bytes: int | None) -> Excess | None:
    """Whether this cell would not fit; None where it may.

    A shorter cell of the same series that ran out of memory settles it. Otherwise the last two lengths of the series
    are extended as a power law (one length alone in proportion), and the L x L matrices of a materialised kernel are
    simply counted.
    """
    shorter = _shorter(cell, done)
    found: list[tuple[float, str]] = [(_matrices(cell), "scores and weights, both L x L")]
    measured = [(earlier.length, row["peak_bytes"]) for earlier, row in shorter if row["peak_bytes"]]
    if measured:
        lengths = " and ".join(str(length) for length, _ in measured[-2:])
        found.append((_extended(measured[-2:], cell.length), f"judged from {lengths} tokens"))
    most, why = max(found)
    for earlier, row in shorter:
        if row["status"] in ("oom", "oom_predicted"):
            return Excess(f"predicted: {earlier.length} tokens did not fit either ({row['error']})", int(most) or None)
    if limit_bytes is None or most <= limit_bytes:
        return None
    said = f"predicted: {most / 2**30:.1f} GiB of tensors ({why}), over the limit of {limit_bytes / 2**30:.1f} GiB"
    return Excess(said, int(most))


def too_slow(cell: SpeedCell, done: Done) -> str | None:
    """A time-out at a shorter length of the same series, in one line; None where there was none."""
    for earlier, row in _shorter(cell, done):
        if row["status"] == "timeout":
            return f"predicted: {earlier.length} tokens timed out already"
    return None


def expected_wall_s(cells: Sequence[SpeedCell], done: Done, budget_s: float) -> float | None:
    """Seconds until these cells are through, judged from measured ones; None before there are any.

    Args:
        cells: what is still to do.
        done: cells with their rows.
        budget_s: see `speed.time_call`.
    """
    known = [(cell, row) for cell, row in done if row["status"] == "ok"]
    if not known:
        return None
    around = min(max(0.0, row["wall_seconds"] - _calls(row["seconds"], budget_s)) for _, row in known)
    return sum(around + _calls(_expected_seconds(cell, known), budget_s) for cell in cells if not _doomed(cell, done))


def _calls(seconds: float, budget_s: float) -> float:
    """What the calls of a cell take together: warm-up, repeats within the budget, and the observed one."""
    return min(7 * seconds, 3 * seconds + budget_s)


def _doomed(cell: SpeedCell, done: Done) -> bool:
    return any(row["status"] in ("oom", "oom_predicted", "timeout", "unsupported") for _, row in _shorter(cell, done))


def _expected_seconds(cell: SpeedCell, known: Done) -> float:
    same = [(earlier.length, row["seconds"]) for earlier, row in _shorter(cell, known)]
    if len(same) > 1:
        return _extended(same[-2:], cell.length)
    if same:
        length, seconds = same[0]
        return seconds * (cell.length / length) ** EXPONENT[registry.recipe(cell.backend)[0].declared.compute]
    others = [row["seconds"] for earlier, row in known if earlier.length == cell.length]
    return max(others or [row["seconds"] for _, row in known])


def _shorter(cell: SpeedCell, done: Done) -> list[tuple[SpeedCell, Row]]:
    """Finished cells of the same series below this length, shortest first."""
    mine = [(each, row) for each, row in done if each.series() == cell.series() and each.length < cell.length]
    return sorted(mine, key=lambda pair: pair[0].length)


def _matrices(cell: SpeedCell) -> int:
    if cell.kernel != "dense" or cell.phase == "decode":
        return 0
    return 2 * cell.batch * cell.heads * cell.length**2 * getattr(torch, cell.dtype).itemsize


def _extended(points: Sequence[tuple[int, float]], length: int) -> float:
    """The power law through two points (through one: in proportion), at a further length."""
    (first, low), (last, high) = points[0], points[-1]
    exponent = 1.0 if first == last else math.log(high / low) / math.log(last / first)
    return high * (length / last) ** min(max(exponent, 0.0), 2.0)
