"""One mechanism on one task: the figure of its runs, which differ in their seed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attention_zoo.report import rows as results
from attention_zoo.report import units
from attention_zoo.report.endings import ended
from attention_zoo.report.groups import COMPRESS, Group, Place, place_of
from attention_zoo.report.metrics import RESULT, value_words
from attention_zoo.results.row import Row


@dataclass(frozen=True)
class Learnt:
    """One mechanism on one task: runs that differ in their seed alone, or, where they are compared, in their machine.

    Fields:
        backend: of all.
        label: the backend, and in what it differs from others on the task.
        rows: finished runs, one a seed.
        failed: runs without a figure: those that did not finish, and those that were not scored by this metric.
        metric: that of the task.
        group: what the runs have in common.
    """

    backend: str
    label: str
    rows: list[Row]
    failed: list[Row]
    metric: str
    group: Group

    @property
    def reads_less(self) -> bool:
        """Whether documents were shortened for it and not for all on the task: costs at whole lengths are not its."""
        return f"{COMPRESS}=" in self.label

    @property
    def values(self) -> list[float]:
        return [float(row["metrics"][self.metric]) for row in self.rows]

    @property
    def mean(self) -> float | None:
        return sum(self.values) / len(self.values) if self.rows else None

    def also(self, metric: str) -> float | None:
        """The mean of another metric."""
        values = [float(row["metrics"][metric]) for row in self.rows if metric in row["metrics"]]
        return sum(values) / len(values) if values else None

    def on(self, name: str) -> float | None:
        """The mean of the metric on one evaluation set; None where no run was scored on it."""
        found = [(row.get("evaluations") or {}).get(name, {}).get(self.metric) for row in self.rows]
        values = [float(value) for value in found if value is not None]
        return sum(values) / len(values) if values else None

    def span(self, key: str | Callable[[Row], Any], words: Callable[[Any], str]) -> str:
        """What the runs say under a key, in words: one figure, or from the least to the most."""
        ask = key if callable(key) else lambda row: row.get(key)
        values = sorted(value for row in self.rows if (value := ask(row)) is not None)
        said = list(dict.fromkeys(words(value) for value in (values[0], values[-1]))) if values else [units.NONE]
        return " to ".join(said)

    @property
    def cut_short(self) -> bool:
        """Whether a time budget ended a run, which then saw fewer tokens than others."""
        return any(ended(row, "time") for row in self.rows)

    @property
    def seeds(self) -> int:
        return len({row.get("seed") for row in self.rows})

    @property
    def places(self) -> set[Place]:
        """Where its runs were made."""
        return {place_of(row) for row in self.rows}

    def paired(self, other: Learnt) -> int:
        """Seeds that both were trained with on one machine."""
        mine, theirs = ({(row.get("seed"), place_of(row)) for row in each.rows} for each in (self, other))
        return len({seed for seed, _ in mine & theirs})

    def words(self) -> str:
        """The figure, with the range over seeds where there are several; of one seed its interval over rows."""
        if not self.rows:
            return ", ".join(dict.fromkeys(missing(row) for row in self.failed)) or units.NONE
        said = value_words(self.mean, self.metric)
        if self.seeds > 1:
            low, high = (value_words(end(self.values), self.metric).removesuffix(" %") for end in (min, max))
            return f"{said} ({low}–{high})"
        found = self.over_rows
        if found is None:
            return said
        ends = "–".join(value_words(end, self.metric).removesuffix(" %") for end in found[0])
        return f"{said} (95 % over {units.count(found[1])} rows: {ends})"

    @property
    def over_rows(self) -> tuple[list[float], int] | None:
        """Of a single run: the interval of its figure over the rows that it was evaluated on, and how many they are."""
        sets = (self.rows[0].get("by_set") or {}) if len(self.rows) == 1 else {}
        judged: Any = sets.get(RESULT) or next(iter(sets.values()), {})
        interval = judged.get("interval")
        return None if interval is None else (interval, judged["rows"])


def missing(row: Row) -> str:
    """Why a row holds no figure: how it ended, or that it was scored otherwise."""
    return "not scored by it" if results.ok(row) else results.status(row)
