"""What the speed rows say: which may stand in one chart, their lines over length, and what follows from each line.

The arithmetic is that of `measure.derived`; no figure is extrapolated beyond the lengths that were measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from attention_zoo.measure import derived
from attention_zoo.measure.derived import Efficiency, efficiency_length, growth_exponent
from attention_zoo.report import groups, units
from attention_zoo.report import rows as results
from attention_zoo.report.groups import Group
from attention_zoo.report.rows import BASELINES
from attention_zoo.results.row import Row

TIME, MEMORY = "seconds", "peak_bytes"
RATE, STATE = "tokens_per_second", "state_bytes"
PEAK, PREDICTED, RESIDENT = "peak_bytes", "predicted_bytes", "resident_bytes"
MARKS = {PEAK: "", PREDICTED: "≈ ", RESIDENT: "*"}
"""How memory was found, and its mark beside a figure. Tensor bytes are compared with tensor bytes alone."""
METHODS = {
    PREDICTED: "≈ predicted, not run",
    RESIDENT: "* by the resident set of the process: calls of this length are not observed tensor by tensor",
}


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
    group: Group

    @property
    def place(self) -> dict[str, str]:
        """Where it was measured: only what was measured in one place is compared."""
        return dict(self.group.place)

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

    def memory(self) -> dict[int, tuple[float, str]]:
        """Bytes by length and how they were found: as peak of tensors where that was observed."""
        found = {}
        for length, row in sorted(self.rows.items()):
            for method in MARKS:
                if row.get(method) and (results.ok(row) or method == PREDICTED):
                    found[length] = (float(row[method]), method)
                    break
        return found

    def said(self, key: str, length: int | None) -> str:
        """A figure in words with its mark, or why there is none."""
        row = self.rows.get(length) if length is not None else None
        if length is None or row is None:
            return units.NONE
        if key == MEMORY and length in (memory := self.memory()):
            said = memory_words(*memory[length])
            return said if results.ok(row) else f"{said} ({results.status(row)})"
        value = self.values(key).get(length)
        return WORDS[key](value) if value is not None else missing(row)

    def failures(self) -> dict[int, Row]:
        return {length: row for length, row in sorted(self.rows.items()) if not results.ok(row)}


WORDS = {TIME: units.seconds, MEMORY: units.size, RATE: units.millions, STATE: units.size}
"""Figures as people read them."""


def memory_words(value: float, method: str) -> str:
    """Bytes with the mark of how they were found."""
    mark, said = MARKS[method], units.size(value)
    return f"{said}{mark}" if mark == "*" else f"{mark}{said}"


def missing(row: Row) -> str:
    """Why a row holds no figure of the kind that was asked for."""
    return "not measured" if results.ok(row) else results.status(row)


def marks(many: Iterable[Series]) -> list[str]:
    """A note on each mark among the figures of several lines."""
    used = {method for series in many for _, method in series.memory().values()}
    return [METHODS[method] for method in METHODS if method in used]


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
    """The lines of one setting: baselines first, then by name. What was made in two places are two lines."""
    found = groups.gather([row for row in rows if row["kind"] == "speed" and setting_of(row) == setting])
    names = groups.labels(list(found), BASELINES)
    many = [
        Series(group.backend, group.kernel, name, {row["length"]: row for row in members}, group)
        for name, (group, members) in zip(names, found.items())
    ]
    place = {key: number for number, key in enumerate(BASELINES)}
    return sorted(many, key=lambda s: (place.get((s.backend, s.kernel), len(place)), s.label))


def longest_common_length(many: list[Series]) -> int | None:
    """The longest length at which every line that holds any figure holds one; None where there is none."""
    measured = [set(series.values(TIME)) & set(series.memory()) for series in many]
    measured = [lengths for lengths in measured if lengths]
    common = set.intersection(*measured) if measured else set()
    return max(common, default=None)


def growth(series: Series, key: str) -> float | None:
    """How the cost grows at the long end: 1 is linear, 2 quadratic; None below two lengths."""
    return growth_exponent(_costs(series, key))


def overtakes(series: Series, baseline: Series, key: str) -> Efficiency | None:
    """The length from which `series` costs less than `baseline` and stays so, as far as measured."""
    return efficiency_length(_costs(series, key), _costs(baseline, key))


def _costs(series: Series, key: str) -> dict[int, float]:
    found = derived.costs([{**row, key: row.get(key)} for row in series.rows.values()], key)
    return {length: value for length, value in found.items() if value > 0}


def crossing_words(crossing: Efficiency) -> str:
    """ "1,200" (interpolated), "≤ 256" (cheaper from the shortest on, or since one failed), "> 4,096" (not up to)."""
    if crossing.length is None:
        return f"> {crossing.up_to:,}"
    return f"{rounded(crossing.length):,}" if crossing.why == "interpolated" else f"≤ {crossing.length:,}"


def rounded(length: float) -> int:
    """Two significant figures: an interpolated length deserves no more."""
    scale = 10 ** max(math.floor(math.log10(length)) - 1, 0)
    return round(length / scale) * scale
