"""The lines of the summary: what a mechanism costs, joined with what it learnt, and said so where options differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from attention_zoo.report import quality, units
from attention_zoo.report.beside import trained_at
from attention_zoo.report.costs import Series
from attention_zoo.report.learnt import Learnt
from attention_zoo.report.quality import Task

OTHER = "°"
"""The mark of what was learnt at other options than those whose costs stand in the same line."""


@dataclass(frozen=True)
class Line:
    """A line of the summary: what one mechanism costs, and what it learnt on each task."""

    label: str
    series: Series | None
    learnt: list[list[Learnt]]

    def said(self, each: Learnt) -> str:
        """What was learnt, marked where the costs of this line are of other options."""
        return f"{each.words()} {OTHER}" if self.trained_at(each) else each.words()

    def trained_at(self, each: Learnt) -> str | None:
        """The mechanism at the options that it was trained with, where those of its costs are others; else None."""
        return None if self.series is None else trained_at(each, self.series)


def lines_of(costs: Sequence[Series], tasks: Sequence[Task]) -> list[Line]:
    """What was learnt stands beside the cost of its backend, but where trainings differ in more than the seed: then
    each group stands beside the cost of its own name, or alone. With costs of several files, their own alone count."""
    files = {series.place.get("file") for series in costs}
    every = [(number, each) for number, task in enumerate(tasks) for each in task.learnt]
    sizes = Counter((number, each.backend) for number, each in every if not each.reads_less)

    def beside(number: int, each: Learnt, series: Series) -> bool:
        alone = sizes[number, each.backend] == 1 and each.label == each.backend
        same = len(files) == 1 or dict(each.group.place).get("file") == series.place.get("file")
        return same and (each.label == series.label or (alone and each.backend == series.backend))

    lines = [
        Line(series.label, series, [[each for each in task.learnt if beside(number, each, series)]
                                     for number, task in enumerate(tasks)])
        for series in costs
    ]  # fmt: skip
    placed = {id(each) for line in lines for many in line.learnt for each in many}
    rest = dict.fromkeys(each.label for _, each in every if id(each) not in placed)
    return lines + [
        Line(label, None, [[each for each in task.learnt if each.label == label and id(each) not in placed]
                            for task in tasks])
        for label in rest
    ]  # fmt: skip


def at_other_options(tasks: Sequence[Task], lines: Sequence[Line]) -> list[str]:
    """What `OTHER` means, if anything has it: by task the options that were trained."""
    said = []
    for number, name in enumerate(quality.names_apart(tasks)):
        options = [at for line in lines for each in line.learnt[number] if (at := line.trained_at(each))]
        said += [f"{name}: {units.listed(list(dict.fromkeys(options)))}"] if options else []
    return [f"{OTHER} trained at other options than the costs of its line are of: {'; '.join(said)}"] if said else []
