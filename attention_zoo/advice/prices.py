"""Seconds and bytes at a length that was asked for: measured there, or as far as the rows of the same line carry.

Between two measured lengths a figure is interpolated, log against log; beyond the longest it follows the exponent that
is fitted to the longest three, at most `FARTHEST` times as far. That is never below 1, since the inputs alone grow so,
and nothing is said where the last step was steeper than the fit, where two lengths alone show a figure to grow faster
than the FLOPs, or where those grow neither in proportion nor as the square, as those of full attention do before its
square rules. Nor is anything below the shortest length, where fixed costs rule.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attention_zoo.advice.lines import Line, line_of
from attention_zoo.measure import derived
from attention_zoo.report import costs, units
from attention_zoo.report import rows as results
from attention_zoo.report.costs import PEAK, TIME, Series, Setting
from attention_zoo.results.row import Row

FARTHEST = 4
"""Times the longest length that was measured."""
ENOUGH = 3
"""Lengths that show whether growth that is faster than that of the FLOPs has settled: caches are left behind once."""
STEEPER = 0.1
"""Of an exponent: by how much the last step may exceed the fit before growth counts as not settled."""


@dataclass(frozen=True)
class Price:
    """One quantity at one length.

    Fields:
        value: seconds or bytes; None: not known; infinite: more than there was.
        how: how it was found, or why it was not.
        rows: which it rests on.
        measured: whether at that length itself.
    """

    value: float | None
    how: str
    rows: Sequence[Row] = ()
    measured: bool = False

    def words(self, key: str) -> str:
        """The figure as it is read, ≈ before what was not measured."""
        if self.value is None or math.isinf(self.value):
            return f"not known: {self.how}" if self.value is None else self.how
        said = units.seconds(self.value) if key == TIME else units.size(self.value)
        return said if self.measured else f"≈ {said}"


@dataclass(frozen=True)
class Costed:
    """What a mechanism costs.

    Fields:
        series: the line of costs; None: nothing was measured.
        line: whose options were measured.
        setting: in which setting.
    """

    series: Series | None
    line: Line | None
    setting: Setting | None

    def price(self, key: str, length: int) -> Price:
        """Args:
        key: TIME or PEAK.
        length: tokens.
        """
        return Price(None, "no rows") if self.series is None else price(self.series, key, length)

    def longest_within(self, memory: float) -> tuple[int, bool] | None:
        """The longest length whose peak stays within some bytes, and whether longer ones do not: False where it is only
        as far as the rows carry."""
        if self.series is None:
            return None
        points = _points(self.series, PEAK)
        found = derived.longest_within(points, memory)
        finite = [length for length, value in points.items() if math.isfinite(value)]
        if found is None or not finite or found.length < min(finite):
            return None
        farthest = FARTHEST * max(finite)
        price = self.price(PEAK, farthest).value
        if price is None or math.isinf(price):  # its growth has not settled, or it ran out of memory on the way
            farthest = max(finite)
        return min(found.length, farthest), found.length <= farthest


def costed(rows: Iterable[Row], *, device: str, phase: str, variant: str) -> dict[Line, list[Costed]]:
    """Every line of costs on a device, by mechanism at its options; of full attention the fused form comes first."""
    wanted = [
        row for row in rows if row["kind"] == "speed" and row["device"].partition(":")[0] == device
        and row["phase"] == phase and row["variant"] == variant
    ]  # fmt: skip
    found: dict[Line, list[Costed]] = {}
    for setting in costs.settings(wanted):
        for series in costs.lines(wanted, setting):
            line = line_of(next(iter(series.rows.values())))
            found.setdefault(line, []).append(Costed(series, line, setting))
    for many in found.values():
        many.sort(key=lambda each: each.series is not None and each.series.kernel == "dense")
    return found


def best(many: Sequence[Costed], length: int) -> Costed:
    """The line of costs that says most of a length: measured there, else derived, else the first."""

    def order(each: Costed) -> tuple[int, int]:
        told = [each.price(key, length) for key in (TIME, PEAK)]
        return -sum(one.measured for one in told), -sum(one.value is not None for one in told)

    return min(many, key=order) if many else Costed(None, None, None)


def price(series: Series, key: str, length: int) -> Price:
    """One quantity of one line at one length."""
    row = series.rows.get(length)
    points = _points(series, key)
    if row is not None and length in points:
        value = points[length]
        said = f"measured at {length:,} tokens" if math.isfinite(value) else results.status(row)
        return Price(value, said, [row], measured=math.isfinite(value))
    finite = {at: value for at, value in points.items() if math.isfinite(value)}
    beyond = [at for at, value in points.items() if math.isinf(value) and at <= length]
    if beyond:
        return Price(math.inf, f"{results.status(series.rows[min(beyond)])} at {min(beyond):,} tokens already",
                     [series.rows[min(beyond)]])  # fmt: skip
    if not finite:
        return Price(None, "no figure was measured")
    lengths = sorted(finite)
    if length < lengths[0]:
        return Price(None, f"shorter than the {lengths[0]:,} tokens that were measured")
    if length < lengths[-1]:
        place = bisect.bisect_left(lengths, length)
        return _between(series, finite, lengths[place - 1], lengths[place], length)
    if length > FARTHEST * lengths[-1]:
        return Price(None, f"more than {FARTHEST} times the longest measured length, {lengths[-1]:,} tokens")
    power, last = derived.growth_exponent(finite), derived.growth_exponent(finite, 2)
    if power is None or last is None:
        return Price(None, f"measured at {lengths[-1]:,} tokens alone, so that no growth is known")
    if last > max(power, 1.0) + STEEPER:
        rising = f"length^{power:.2f} over three lengths, length^{last:.2f} over the last two"
        return Price(None, f"its growth has not settled by {lengths[-1]:,} tokens, {rising}")
    used, work = max(power, 1.0), derived.growth_exponent(_flops(series, finite), 2)
    if key == TIME and work is not None and (1 + STEEPER < work < 2 - STEEPER or work > used + STEEPER):
        so_far = f"time as length^{power:.2f}, FLOPs as length^{work:.2f}"
        return Price(None, f"its growth has not settled by {lengths[-1]:,} tokens, {so_far}")
    if len(finite) < ENOUGH and power > max(work or 1.0, 1.0) + STEEPER:
        so_far = (
            f"length^{power:.2f} over {len(finite)} lengths, FLOPs as length^{work:.2f}"
            if work
            else f"length^{power:.2f}"
        )
        return Price(
            None, f"two lengths do not show whether its growth has settled by {lengths[-1]:,} tokens, {so_far}"
        )
    said = "the exponent of its own rows"
    if power < 1:
        said = f"in proportion, since its own rows grow as length^{power:.2f}"
    value = finite[lengths[-1]] * (length / lengths[-1]) ** used
    rows = [series.rows[at] for at in lengths[-3:]]
    return Price(value, f"extrapolated from {lengths[-1]:,} tokens as length^{used:.2f}, {said}", rows)


def _between(series: Series, finite: Mapping[int, float], low: int, high: int, length: int) -> Price:
    share = math.log(length / low) / math.log(high / low)
    value = finite[low] * (finite[high] / finite[low]) ** share
    return Price(value, f"interpolated between {low:,} and {high:,} tokens", [series.rows[low], series.rows[high]])


def _flops(series: Series, lengths: Iterable[int]) -> dict[int, float]:
    found = {at: series.rows[at].get("flops") for at in lengths}
    return {at: float(value) for at, value in found.items() if value}


def _points(series: Series, key: str) -> dict[int, float]:
    """Peak bytes as they were observed: of the resident set and of predictions nothing is derived."""
    found = derived.costs([{**row, key: row.get(key)} for row in series.rows.values()], key)
    return {length: value for length, value in found.items() if value > 0}
