"""What follows from rows: how cost grows, from which length a mechanism pays, and what length fits a memory.

Arithmetic on costs by length; nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attention_zoo.results.row import Row

Costs = Mapping[int, float]
"""Cost by length; infinite where a cell did not survive."""

FATAL = {"seconds": ("oom", "oom_predicted", "timeout"), "peak_bytes": ("oom", "oom_predicted")}
"""Endings that mean that a quantity is beyond all bounds. A time-out says nothing about memory."""


def costs(rows: Iterable[Row], quantity: str) -> dict[int, float]:
    """Cost by length of the rows of one series, shortest first.

    Args:
        rows: of kind "speed", the same but for their length.
        quantity: "seconds" or "peak_bytes".

    Returns:
        Figures; infinity where the cell ended for want of that quantity; nothing where it ended otherwise.
    """
    found = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        if row["status"] == "ok":
            if row[quantity] is not None:  # memory of a very long call is not observed
                found[row["length"]] = float(row[quantity])
        elif row["status"] in FATAL[quantity]:
            found[row["length"]] = math.inf
    return found


def growth_exponent(points: Costs, tail: int = 3) -> float | None:
    """p in cost ~ length^p, fitted in log-log over the longest `tail` lengths; None below two finite positive ones.

    Short lengths are left out because fixed costs hide the law there.
    """
    usable = _usable(points)[-tail:]
    if len(usable) < 2:
        return None
    xs, ys = [math.log(length) for length, _ in usable], [math.log(value) for _, value in usable]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)


@dataclass(frozen=True)
class Efficiency:
    """From which length on a mechanism costs less than a baseline.

    Fields:
        length: tokens; None if it never does within what was measured.
        up_to: the longest length at which both are known.
        why: "interpolated", "from the shortest" (cheaper at every common length), "one failed" (nothing to interpolate:
            one of the two did not survive next to the crossing) or "not reached".
    """

    length: int | None
    up_to: int
    why: str

    def __str__(self) -> str:
        if self.length is None:
            return f"not up to {self.up_to}"
        return str(self.length) if self.why == "interpolated" else f"≤ {self.length}"


def efficiency_length(mine: Costs, baseline: Costs, margin: float = 1.0) -> Efficiency | None:
    """Where a mechanism overtakes a baseline for good, as far as both were measured.

    Args:
        mine, baseline: costs of both.
        margin: how many times cheaper it must be to count (1.5 where timings are noisy).

    Returns:
        The crossing, interpolated in log-log between the last common length at which the baseline is no dearer and the
        next; None without a common length at which one of them is finite.
    """
    common = sorted(each for each in mine.keys() & baseline.keys() if math.isfinite(min(mine[each], baseline[each])))
    if not common:
        return None
    # log of baseline / mechanism: positive where the mechanism pays
    gain = [math.log(baseline[each]) - math.log(mine[each]) - math.log(margin) for each in common]
    behind = [place for place, value in enumerate(gain) if value <= 0]
    if not behind:
        return Efficiency(common[0], common[-1], "from the shortest")
    last = behind[-1]
    if last == len(common) - 1:
        return Efficiency(None, common[-1], "not reached")
    if not (math.isfinite(gain[last]) and math.isfinite(gain[last + 1])):
        return Efficiency(common[last + 1], common[-1], "one failed")
    share = -gain[last] / (gain[last + 1] - gain[last])
    crossing = common[last] * (common[last + 1] / common[last]) ** share
    return Efficiency(round(crossing), common[-1], "interpolated")


@dataclass(frozen=True)
class Longest:
    """The longest length whose peak stays within a budget.

    Fields:
        length: tokens, by the fitted law.
        verified: the longest measured length within the budget; None if there is none.
        predicted: whether `length` lies beyond what was measured. If not, it lies between a length that fits and one
            that does not.
    """

    length: int
    verified: int | None
    predicted: bool

    def __str__(self) -> str:
        return f"{self.length} (predicted)" if self.predicted else str(self.length)


def longest_within(points: Costs, budget_bytes: float, tail: int = 3) -> Longest | None:
    """Longest length within a memory budget, from peaks over lengths; None below two finite positive ones.

    Between measured lengths it is interpolated in log-log. Beyond them the law of the longest `tail` is extended, never
    flatter than in proportion to length, since inputs and gradients alone need that.
    """
    usable = _usable(points)
    slope = growth_exponent(points, tail)
    if slope is None:
        return None
    fits = [(length, value) for length, value in usable if value <= budget_bytes]
    above = [(length, value) for length, value in usable if value > budget_bytes]
    if fits and above and fits[-1] < above[0]:
        (low, less), (high, more) = fits[-1], above[0]
        local = math.log(more / less) / math.log(high / low)
        return Longest(int(low * (budget_bytes / less) ** (1 / local)), low, False)
    length, value = fits[-1] if fits else usable[0]
    reached = int(length * (budget_bytes / value) ** (1 / max(slope, 1.0)))
    return Longest(reached, fits[-1][0] if fits else None, True)


def _usable(points: Costs) -> list[tuple[int, float]]:
    return sorted((length, value) for length, value in points.items() if 0 < value < math.inf)
