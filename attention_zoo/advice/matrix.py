"""Which attention for which problem: mechanisms at stated options by kinds of problem, beside what they cost.

A cell is the gap to full attention with its 95 % interval, or "not known" and why; no gap is ever of rows without a
verdict, no cost of other options without saying so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attention_zoo.advice.gaps import NO_ROWS, Gap, gaps
from attention_zoo.advice.kinds import KINDS, Kind
from attention_zoo.advice.lines import Line, Source
from attention_zoo.advice.prices import Costed, best, costed
from attention_zoo.overview import markdown
from attention_zoo.report import units
from attention_zoo.report.cells import Table
from attention_zoo.report.costs import PEAK, TIME
from attention_zoo.report.metrics import metric_words
from attention_zoo.report.quality import Task
from attention_zoo.results.row import Row
from attention_zoo.statistics import preset_seeds

PRESET = "choice"
"""Whose rows fill the matrix."""
QUANTITIES = ((TIME, "seconds"), (PEAK, "bytes"))


@dataclass(frozen=True)
class Matrix:
    """All cells.

    Fields:
        lines: mechanisms at their options, full attention first.
        kinds: the columns.
        cells: by line and key of the column; what is not there has no rows.
        prices: of each line the costs at its own options, or else at others of the same mechanism; see `own`.
        length: tokens at which costs are told; None: of no length, so none are.
    """

    lines: list[Line]
    kinds: Sequence[Kind]
    cells: Mapping[tuple[Line, str], Gap]
    prices: Mapping[Line, Costed]
    length: int | None

    @staticmethod
    def of(
        rows: Iterable[Row], length: int | None = None, *, kinds: Sequence[Kind] = KINDS, device: str = "cpu",
        phase: str = "forward_backward", variant: str = "layer",
    ) -> Matrix:  # fmt: skip
        """Args:
        rows: that were checked, see `report.rows.sift`.
        length: tokens at which costs are asked for.
        kinds: the columns.
        device, phase, variant: of the costs.
        """
        rows = list(rows)
        cells = gaps(rows, kinds)
        found = costed(rows, device=device, phase=phase, variant=variant)
        lines = list(dict.fromkeys([*(line for line, _ in cells), *found]))
        lines.sort(key=lambda line: (line.backend != "full", line.backend, line.options))
        at = 1 if length is None else length
        prices = {}
        for line in lines:
            many = found.get(line) or [each for other, them in found.items() if other.backend == line.backend
                                       for each in them]  # fmt: skip
            prices[line] = best(many, at)
        return Matrix(lines, kinds, cells, prices, length)

    def cell(self, line: Line, kind: Kind) -> Gap:
        return self.cells.get((line, kind.key)) or Gap(kind, line, NO_ROWS)

    def price_words(self, line: Line, key: str) -> str:
        """A cost in a table, with the options that it is of where these are others."""
        assert self.length is not None
        costs = self.prices[line]
        said = costs.price(key, self.length).words(key)
        other = costs.line is not None and costs.line != line and not said.startswith("not known")
        return f"{said} [of {costs.line.label}]" if other and costs.line else said

    def table(self) -> Table:
        """In words, of the columns that any row answers."""
        kinds = [kind for kind in self.kinds if any(key == kind.key for _, key in self.cells)] or list(self.kinds)
        headers = ["mechanism", *(self._heading(kind) for kind in kinds)]
        quantities = () if self.length is None else QUANTITIES
        at = "" if self.length is None else f" at {self.length:,}"
        headers += [f"{'time' if key == TIME else 'peak memory'}{at}" for key, _ in quantities]
        cells = [
            [line.label, *(self.cell(line, kind).words() for kind in kinds),
             *(self.price_words(line, key) for key, _ in quantities)]
            for line in self.lines
        ]  # fmt: skip
        missing = [kind.title for kind in self.kinds if kind not in kinds]
        notes = [f"No rows answer: {', '.join(missing)}"] if missing else []
        return Table(headers, cells, notes)

    def _heading(self, kind: Kind) -> str:
        tasks = {gap.task.title: gap.task for (_, key), gap in self.cells.items() if key == kind.key and gap.task}
        metrics = dict.fromkeys(metric_words(task.metric) for task in tasks.values())
        return f"{kind.title}: {', '.join(metrics)} on {'; '.join(tasks)}" if tasks else kind.title

    def ranking(self) -> str | None:
        """That so few seeds rank nothing, and what would; None where a gap is known or nothing was trained."""
        learnt = [gap for gap in self.cells.values() if gap.value is not None]
        if not learnt or any(gap.known for gap in learnt):
            return None
        seeds = {row.get("seed") for gap in learnt for row in gap.rows}
        others = max(len(gap.task.others) for gap in learnt if gap.task is not None)
        needed = preset_seeds(max(others, 1, *(gap.family for gap in learnt)))
        word = f"{len(seeds)} seed" + ("" if len(seeds) == 1 else "s")
        if len(seeds) >= needed:
            return f"No ranking from {word}: each cell says why."
        many = f"{others} mechanism" + ("" if others == 1 else "s")
        return (
            f"No ranking from {word}: {needed} seeds are needed for {many} beside full attention, "
            f"`preset={PRESET}` runs them."
        )

    def bars(self) -> list[str]:
        """Text beside the trivial rule that it must beat, from the rows."""
        said = dict.fromkeys(
            _bar(gap.task, gap.full) for gap in self.cells.values()
            if gap.task is not None and gap.full is not None and gap.task.metric.startswith("bits_")
        )  # fmt: skip
        return [each for each in said if each]

    def markdown(self) -> str:
        table = self.table()
        return "\n\n".join([markdown(table.headers, table.cells), *(f"{note}." for note in table.notes)])

    def as_json(self) -> list[dict[str, Any]]:
        """Each cell and each cost with its figures and the rows that it rests on."""
        found: list[dict[str, Any]] = []
        for line in self.lines:
            for kind in self.kinds:
                found.append(_of_gap(self.cell(line, kind)))
            for key, unit in () if self.length is None else QUANTITIES:
                costs = self.prices[line]
                price = costs.price(key, self.length or 1)
                found.append({
                    "mechanism": line.label, "column": key, "unit": unit, "length": self.length,
                    "known": price.value is not None, "value": price.value, "how": price.how,
                    "options": None if costs.line is None else costs.line.label,
                    "rows": [Source.of(row)._asdict() for row in price.rows],
                })  # fmt: skip
        return found

    def as_csv(self) -> str:
        """The same without the rows, a line each."""
        many = [{key: value for key, value in each.items() if key != "rows"} for each in self.as_json()]
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(key for each in many for key in each)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(many)
        return out.getvalue()


def _bar(task: Task, full: float) -> str:
    """A sentence on the trivial rule; nothing where a task has none."""
    if task.bar is None:
        return ""
    name, value = task.bar
    end = "." if task.beats(full, value) else ": undertrained."
    said = f"On {task.title} full attention reached {units.fixed(full, 3)} {metric_words(task.metric)}"
    return f"{said}, the best rule without a model ({name}) {units.fixed(value, 3)}{end}"


def _of_gap(gap: Gap) -> dict[str, Any]:
    pairs = gap.verdict.pairs if gap.known and gap.verdict is not None else None
    low, high = gap.interval or (None, None) if pairs is not None else (None, None)
    return {
        "mechanism": gap.line.label, "column": gap.kind.key, "unit": gap.task.metric if gap.task else None,
        "known": gap.known, "why": gap.why, "value": gap.value, "full": gap.full, "edge": gap.edge,
        "gap": pairs.mean if pairs else None, "low": low, "high": high, "seeds": len(pairs) if pairs else None,
        "seeds_of": gap.several or None,
        "verdict": gap.verdict_words if gap.known else None, "rows": [Source.of(row)._asdict() for row in gap.rows],
    }  # fmt: skip
