"""What may be said of mechanisms beside full attention on a task: better, worse, as good, or nothing, and why nothing.

The tests are those of `attention_zoo.statistics`; mechanisms are not compared with one another, so there is no order
among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attention_zoo.report import units
from attention_zoo.report.cells import Table
from attention_zoo.report.metrics import could_words, difference_words, margin, margin_words, seeds_words, value_words
from attention_zoo.report.quality import Learnt, Task
from attention_zoo.statistics import Pairs, Verdict, judge

UNCERTAIN = (
    "Each mechanism is compared with full attention alone, seed by seed: paired t tests by Holm's steps over all "
    "mechanisms of the task at that length, and as good is what two one-sided tests hold within a margin. Of all "
    "verdicts of a task at a length none is false with a probability of 95 %; tasks and lengths stand each for "
    "themselves. Intervals are of each difference alone, 95 %. Mechanisms are not compared with one another."
)

MOST_TOLD = 12
"""Mechanisms that a sentence names; a sweep over options has hundreds, which nobody reads in one."""


@dataclass(frozen=True)
class Compared:
    """One mechanism beside full attention.

    Fields:
        task: on which.
        learnt: what it reached.
        verdict: of the tests; what is shown is not said where there is a refusal.
        refusal: why nothing may be said of it, or None.
        family: how many mechanisms are compared with full attention there.
    """

    task: Task
    learnt: Learnt
    verdict: Verdict
    refusal: str | None
    family: int

    @property
    def kind(self) -> str | None:
        """better | worse | as good, or None where there is no verdict. A shown difference comes first."""
        if self.refusal is not None:
            return None
        if self.verdict.different:
            lower = (self.verdict.pairs.mean or 0.0) < 0
            return "better" if lower == self.task.lower_is_better else "worse"
        return "as good" if self.verdict.equivalent else None

    @property
    def difference(self) -> str:
        """What it reached less what full attention did, with its sign."""
        mean = self.verdict.pairs.mean
        return units.NONE if mean is None else difference_words(mean, self.task.metric, signed=True)

    @property
    def interval(self) -> str:
        """Of the difference; nothing where the seeds tell none."""
        found = self.verdict.pairs.interval()
        if found is None:
            return units.NONE
        low, high = (difference_words(end, self.task.metric, signed=True, unit=end is found[1]) for end in found)
        return f"{low} to {high}"

    def words(self) -> str:
        """The verdict as a part of a sentence."""
        pairs, metric = self.verdict.pairs, self.task.metric
        if self.kind is None:
            return f"no verdict: {self.refusal or self._why()}{self._left_out()}"
        within = f"(within ± {margin_words(metric)})"
        interval = "" if self.interval == units.NONE else f" (95 %: {self.interval})"
        if self.kind == "as good":
            return f"as good as full {within}, difference {self.difference}{interval}{self._left_out()}"
        size = difference_words(abs(pairs.mean or 0.0), metric)
        also = f", and yet as good {within}" if self.verdict.equivalent else ""
        return f"{self.kind} than full by {size}{interval}{also}{self._left_out()}"

    def _why(self) -> str:
        """Why the tests show nothing."""
        verdict, metric = self.verdict, self.task.metric
        pairs, count = verdict.pairs, len(verdict.pairs)
        if not count:
            return f"no seed in common with full, {seeds_words(self.family)}"
        if count == 1:
            return f"one seed shows no difference, {seeds_words(self.family)}"
        if not pairs.spread:
            same = f"the same difference ({self.difference}) in all {count} seeds"
            return f"{same} tells no spread, {seeds_words(self.family)}"
        return could_words(verdict, metric)

    def _left_out(self) -> str:
        pairs = self.verdict.pairs
        said = []
        if pairs.unpaired:
            said.append(f"{pairs.unpaired} {'seed' if pairs.unpaired == 1 else 'seeds'} that only one of both has")
        if pairs.broken:
            said.append(f"{pairs.broken} {'seed' if pairs.broken == 1 else 'seeds'} without a finite figure")
        return f" [without {' and '.join(said)}]" if said else ""


def compared(task: Task) -> list[Compared]:
    """Every mechanism of a task beside full attention; none where nothing may be said of the task at all."""
    full, others = task.full, task.others
    if full is None or not others or task.obstacles():
        return []
    family = {each.label: Pairs.of(_by_seed(each), _by_seed(full)) for each in others}
    verdicts = judge(family, margin(task.metric))
    found = []
    for each in others:
        found.append(Compared(task, each, verdicts[each.label], _refusal(task, each), len(others)))
    return found


def _refusal(task: Task, each: Learnt) -> str | None:
    """Why nothing may be said of one mechanism, whatever its seeds show."""
    if apart := task.apart(each):
        return f"its runs differ from those of full in more than the mechanism ({', '.join(apart)})"
    why = task.undertrained(each)
    return None if why is None else f"undertrained, it {why}"


def _by_seed(learnt: Learnt) -> list[tuple[Any, float]]:
    return [(row.get("seed"), value) for row, value in zip(learnt.rows, learnt.values)]


def sentence(task: Task) -> str:
    """All that is said of a task's mechanisms, beside what they reached."""
    length = f" ({task.seq_len:,} tokens)" if task.seq_len else ""
    start = f"On {task.named}{length}, {task.judged}: "
    found, told = compared(task), _told(task)
    rest = sum(bool(each.rows) for each in task.learnt) - len(told)
    more = [f"{rest:,} more, in the table"] if rest else []
    if not found or task.full is None:
        figures = [f"{each.label} {each.words()}" for each in told]
        obstacles = task.obstacles()
        tail = f" ({'; '.join(obstacles)})" if obstacles else ""
        return f"{start}{units.listed([*figures, *more])}{tail}."
    parts = [f"{task.full.label} {task.full.words()}"]
    parts += [
        f"{each.learnt.label} {value_words(each.learnt.mean, task.metric)}, {each.words()}"
        for each in found
        if any(each.learnt is one for one in told)
    ]
    return f"{start}{'; '.join([*parts, *more])}."


def _told(task: Task) -> list[Learnt]:
    """What a sentence names: all, or, of more than anyone reads in one, full attention and the best."""
    learnt = [each for each in task.learnt if each.rows]
    if len(learnt) <= MOST_TOLD:
        return learnt
    full, sign = task.full, 1 if task.lower_is_better else -1
    best = sorted((each for each in learnt if each is not full), key=lambda each: sign * (each.mean or 0.0))
    kept = {id(each) for each in best[: MOST_TOLD - (full is not None)]} | {id(full)}
    return [each for each in learnt if id(each) in kept]


def verdicts_table(task: Task) -> Table:
    """A line for each mechanism beside full attention; no line where nothing may be said of the task."""
    headers = ["", "reached", "seeds in pairs", "difference from full", "95 % interval", "verdict"]
    return Table(
        headers,
        [[each.learnt.label, value_words(each.learnt.mean, task.metric), str(len(each.verdict.pairs)), each.difference,
          each.interval, each.words()] for each in compared(task)],
    )  # fmt: skip
