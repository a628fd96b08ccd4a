"""What the quality rows say: one figure per task and mechanism over its seeds, and whether it may be ranked at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attention_zoo.report import rows as results
from attention_zoo.report import units
from attention_zoo.report.rows import Row

LEARNT = 0.95
"""Accuracy that full attention must reach before a recall task tells mechanisms apart."""
PARITY = 1.10
"""Models whose parameter counts differ by more than this factor are called out."""

PRIMARY = {"bits_per_byte": True, "accuracy": False, "loss": True}
"""Metrics that a task may be judged by, in order of preference, and whether lower is better."""
METRIC_WORDS = {"bits_per_byte": "bits per byte", "accuracy": "accuracy", "loss": "loss (nats)"}


def spoken(name: str) -> str:
    """The name of an evaluation set in words."""
    return name.replace("_", " ")


@dataclass(frozen=True)
class Learnt:
    """One mechanism on one task."""

    backend: str
    label: str
    rows: list[Row]
    """Finished runs, one a seed."""
    failed: list[Row]
    metric: str

    @property
    def values(self) -> list[float]:
        return [float(row["metrics"][self.metric]) for row in self.rows]

    @property
    def mean(self) -> float | None:
        return sum(self.values) / len(self.values) if self.rows else None

    def on(self, name: str) -> float | None:
        """The mean of the metric on one evaluation set; None where no run was scored on it."""
        found = [
            row["evaluations"][name].get(self.metric) for row in self.rows if name in (row.get("evaluations") or {})
        ]
        values = [float(value) for value in found if value is not None]
        return sum(values) / len(values) if values else None

    @property
    def steps(self) -> int:
        """Fewest steps that a run of it made."""
        return min(int(row["steps"]) for row in self.rows)

    @property
    def cut_short(self) -> bool:
        """Whether a time budget ended a run, which then saw fewer tokens than others."""
        return any(str(row.get("stopped") or "").startswith("time") for row in self.rows)

    @property
    def seeds(self) -> int:
        return len({row.get("seed") for row in self.rows})

    def words(self) -> str:
        """The figure, with the range over seeds where there are several."""
        if not self.rows:
            return results.status(self.failed[0]) if self.failed else units.NONE
        said = value_words(self.mean, self.metric)
        if self.seeds < 2:
            return said
        low, high = (value_words(end(self.values), self.metric).removesuffix(" %") for end in (min, max))
        return f"{said} ({low}–{high})"


def value_words(value: float | None, metric: str) -> str:
    return units.percent(value) if metric == "accuracy" else units.fixed(value, 3)


@dataclass(frozen=True)
class Task:
    """All mechanisms on one task at one sequence length."""

    name: str
    seq_len: int
    metric: str
    learnt: list[Learnt]

    @property
    def lower_is_better(self) -> bool:
        return PRIMARY.get(self.metric, True)

    @property
    def title(self) -> str:
        return f"{self.name}, {self.seq_len:,} tokens"

    @property
    def sets(self) -> list[str]:
        """Names of the evaluation sets, the main one first."""
        rows = [row for each in self.learnt for row in each.rows]
        return list(dict.fromkeys(name for row in rows for name in row.get("evaluations") or {}))

    @property
    def full(self) -> Learnt | None:
        return next((each for each in self.learnt if each.backend == "full" and each.rows), None)

    def obstacles(self) -> list[str]:
        """Why the mechanisms must not be ranked on this task; empty when they may be."""
        found = []
        if self.full is None:
            found.append("no full attention to compare with: do not rank")
        elif self.metric == "accuracy" and (self.full.mean or 0.0) < LEARNT:
            found.append(
                f"undertrained: do not rank (full attention itself reached {units.percent(self.full.mean)}, "
                f"below {LEARNT:.0%})"
            )
        cut = [f"{each.label} {each.steps:,}" for each in self.learnt if each.cut_short]
        if cut:
            found.append(
                f"unequal training: do not rank (time was over before the planned steps: {', '.join(cut)} steps)"
            )
        if any(each.seeds < 2 for each in self.learnt if each.rows):
            found.append("no ranking: one seed")
        return found

    def ranking(self) -> str:
        """Best first; neighbours whose ranges over seeds overlap share a place."""
        order = sorted(
            (each for each in self.learnt if each.rows),
            key=lambda each: each.mean or 0.0,
            reverse=not self.lower_is_better,
        )
        said = ""
        for number, each in enumerate(order):
            if number:
                before = order[number - 1]
                overlap = min(max(before.values), max(each.values)) >= max(min(before.values), min(each.values))
                said += " ≈ " if overlap else ", then "
            said += f"{each.label} {value_words(each.mean, self.metric)}"
        return said

    def parity(self) -> str | None:
        """A sentence on models of unequal size, None when all are within 10 % of full (or of the smallest)."""
        sizes: dict[str, int] = {
            each.label: each.rows[0]["parameters"]
            for each in self.learnt
            if each.rows and each.rows[0].get("parameters")
        }
        if not sizes:
            return None
        reference = sizes.get(self.full.label, min(sizes.values())) if self.full else min(sizes.values())
        name = "full" if self.full else "the smallest"
        off = {
            label: count for label, count in sizes.items() if count > reference * PARITY or count * PARITY < reference
        }
        if not off:
            return None
        said = ", ".join(
            f"{label} {units.millions(count)} ({count / reference - 1:+.0%})" for label, count in off.items()
        )
        return (
            f"{self.title}: parameter counts differ by more than 10 % from {name} ({units.millions(reference)}): {said}"
        )


def tasks(rows: Iterable[Row]) -> list[Task]:
    """The tasks among quality rows, text first."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["kind"] == "quality":
            groups.setdefault((str(row.get("task")), int(row.get("seq_len") or 0)), []).append(row)
    found = [_task(name, seq_len, members) for (name, seq_len), members in groups.items()]
    preference = list(PRIMARY)
    return sorted(found, key=lambda task: (preference.index(task.metric), task.name, task.seq_len))


def _task(name: str, seq_len: int, members: list[Row]) -> Task:
    finished = [row for row in members if results.ok(row)]
    metric = next((key for key in PRIMARY if any(key in row["metrics"] for row in finished)), "loss")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in members:
        groups.setdefault((row["backend"], repr(sorted(results.options(row).items()))), []).append(row)
    learnt = []
    for (backend, _), group in groups.items():
        rivals = [key for key in groups if key[0] == backend]
        label = backend
        if len(rivals) > 1:
            said = results.differing([results.options(groups[rival][0]) for rival in rivals])
            label += f" ({said[rivals.index((backend, _))]})"
        good = [row for row in group if results.ok(row) and metric in row["metrics"]]
        learnt.append(Learnt(backend, label, good, [row for row in group if not results.ok(row)], metric))
    return Task(name, seq_len, metric, sorted(learnt, key=lambda each: (each.backend != "full", each.label)))
