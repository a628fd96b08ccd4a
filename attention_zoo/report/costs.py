"""What the speed rows say: which may stand in one chart, their lines over length, and what follows from each line.

The arithmetic is that of `measure.derived`; no figure is extrapolated beyond the lengths that were measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from attention_zoo.measure.derived import Efficiency, costs, efficiency_length, growth_exponent
from attention_zoo.report import rows as results
from attention_zoo.report.rows import BASELINES, Row

TIME, MEMORY = "seconds", "peak_bytes"
RATE, STATE = "tokens_per_second", "state_bytes"


class Setting(NamedTuple):
    """All that must be equal before two cells may stand in one chart."""

    variant: str
    phase: str
    device: str
    dtype: str
    batch: int
    heads: int
    head_width: int
    causal: bool
    threads: int

    def words(self) -> str:
        phase = self.phase.replace("_", " + ")
        kind = "causal" if self.causal else "two-sided"
        return (
            f"{self.variant}, {phase}, {kind}, {self.heads} heads × {self.head_width}, batch {self.batch}, "
            f"{self.dtype}, {self.device}, {self.threads} thread{'s' if self.threads != 1 else ''}"
        )


@dataclass(frozen=True)
class Series:
    """One line of a cost chart: one mechanism with one kernel and one set of options, by length."""

    backend: str
    kernel: str
    label: str
    rows: dict[int, Row]

    @property
    def baseline(self) -> bool:
        return (self.backend, self.kernel) in BASELINES

    def values(self, key: str) -> dict[int, float]:
        """Figures by length, shortest first, without the cells that hold none."""
        return {
            length: float(row[key])
            for length, row in sorted(self.rows.items())
            if results.ok(row) and row.get(key) is not None and row[key] > 0
        }

    def failures(self) -> dict[int, Row]:
        return {length: row for length, row in sorted(self.rows.items()) if not results.ok(row)}


def told(setting: Setting) -> tuple[str, str]:
    """What one asks about: bytes and seconds of a call; where a state is carried its bytes, and tokens a second."""
    return (STATE, RATE) if setting.phase in ("prefill", "decode") else (MEMORY, TIME)


def settings(rows: Iterable[Row]) -> list[Setting]:
    """The settings among speed rows, that with most rows first."""
    found = Counter(setting_of(row) for row in rows if row["kind"] == "speed")
    return [setting for setting, _ in found.most_common()]


def setting_of(row: Row) -> Setting:
    return Setting(*(row.get(field) for field in Setting._fields))  # type: ignore[arg-type]


def lines(rows: Iterable[Row], setting: Setting) -> list[Series]:
    """The lines of one setting: baselines first, then by name."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "speed" and setting_of(row) == setting:
            key = (row["backend"], row.get("kernel") or "", repr(sorted(results.options(row).items())))
            groups.setdefault(key, []).append(row)
    found = []
    for (backend, kernel, _), members in groups.items():
        kernels = sorted({other[1] for other in groups if other[0] == backend})
        rivals = [key for key in groups if key[:2] == (backend, kernel)]
        label = BASELINES.get((backend, kernel), backend)
        extra = [kernel] if len(kernels) > 1 and (backend, kernel) not in BASELINES else []
        if len(rivals) > 1:
            said = results.differing([results.options(groups[rival][0]) for rival in rivals])
            mine = rivals.index((backend, kernel, _))
            extra.append(said[mine])
        label += f" ({'; '.join(extra)})" if extra else ""
        found.append(Series(backend, kernel, label, {row["length"]: row for row in members}))
    order = list(BASELINES)
    place = {key: number for number, key in enumerate(order)}
    return sorted(found, key=lambda s: (place.get((s.backend, s.kernel), len(order)), s.label))


def longest_common_length(many: list[Series]) -> int | None:
    """The longest length at which every line that holds any figure holds one; None where there is none."""
    measured = [set(series.values(TIME)) & set(series.values(MEMORY)) for series in many]
    measured = [lengths for lengths in measured if lengths]
    common = set.intersection(*measured) if measured else set()
    return max(common, default=None)


def growth(series: Series, key: str) -> float | None:
    """How the cost grows at the long end: 1 is linear, 2 quadratic; None below two lengths."""
    return growth_exponent(costs(series.rows.values(), key))


def overtakes(series: Series, baseline: Series, key: str) -> Efficiency | None:
    """The length from which `series` costs less than `baseline` and stays so, as far as measured."""
    return efficiency_length(costs(series.rows.values(), key), costs(baseline.rows.values(), key))


def crossing_words(crossing: Efficiency) -> str:
    """ "1,200" (interpolated), "≤ 256" (cheaper from the shortest on, or since one failed), "> 4,096" (not up to)."""
    if crossing.length is None:
        return f"> {crossing.up_to:,}"
    return f"{rounded(crossing.length):,}" if crossing.why == "interpolated" else f"≤ {crossing.length:,}"


def rounded(length: float) -> int:
    """Two significant figures: an interpolated length deserves no more."""
    scale = 10 ** max(math.floor(math.log10(length)) - 1, 0)
    return round(length / scale) * scale
