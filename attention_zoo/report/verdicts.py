"""What may be said of mechanisms beside full attention on a task: better, worse, as good, or nothing, and why nothing.

The tests are those of `attention_zoo.statistics`; mechanisms are not compared with one another, so there is no order
among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attention_zoo.report import units
from attention_zoo.report.cells import Table
from attention_zoo.report.comparisons import Comparison
from attention_zoo.report.learnt import Learnt
from attention_zoo.report.machines import several
from attention_zoo.report.metrics import could_words, difference_words, margin, margin_words, seeds_words, value_words
from attention_zoo.report.quality import Task
from attention_zoo.statistics import Verdict, judge

UNCERTAIN = (
    "Each mechanism is compared with full attention alone, seed by seed, both trained on one machine: paired t tests "
    "by Holm's steps over all comparisons of the task at that length, recall within and beyond a mechanism's reach "
    "being two, and as good is what two one-sided tests hold within a margin. Of all verdicts of a task at a length, "
    "those of the matrix among them, none is false with a probability of 95 %; tasks and lengths stand each for "
    "themselves. Intervals are of each difference alone, 95 %. Mechanisms are not compared with one another."
)

MOST_TOLD = 12
"""Mechanisms that a sentence names; a sweep over options has hundreds, which nobody reads in one."""


@dataclass(frozen=True)
class Compared:
    """One mechanism beside full attention.

    Fields:
        task: on which, or which stratum of it.
        comparison: what is compared.
        verdict: of the tests; what is shown is not said where there is a refusal.
        refusal: why nothing may be said of it, or None.
        family: how many comparisons are judged together.
    """

    task: Task
    comparison: Comparison
    verdict: Verdict
    refusal: str | None
    family: int

    @property
    def learnt(self) -> Learnt:
        """What it reached."""
        return self.comparison.learnt

    @property
    def where(self) -> str:
        """Which answers it is of, as the beginning of a phrase; "" of all."""
        edge = self.comparison.edge
        if self.comparison.part == "all" or edge is None:
            return ""
        return f"up to {edge:,} back " if self.comparison.part == "within" else f"over {edge:,} back "

    @property
    def several(self) -> str:
        """ "2 machines", where its pairs are of several places; "" of one."""
        return several(self.comparison.places)

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
            return f"no verdict: {self.refusal or self._why()}{self._notes()}"
        within = f"(within ± {margin_words(metric)})"
        interval = "" if self.interval == units.NONE else f" (95 %: {self.interval})"
        if self.kind == "as good":
            return f"as good as full {within}, difference {self.difference}{interval}{self._notes()}"
        size = difference_words(abs(pairs.mean or 0.0), metric)
        also = f", and yet as good {within}" if self.verdict.equivalent else ""
        return f"{self.kind} than full by {size}{interval}{also}{self._notes()}"

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

    def _notes(self) -> str:
        pairs, said = self.verdict.pairs, []
        several_places = several(place for _, place, _ in (*self.comparison.own, *self.comparison.theirs))
        if pairs.unpaired:
            alone = "not both have in one place" if several_places else "only one of both has"
            said.append(f"{pairs.unpaired} {_seeds(pairs.unpaired)} that {alone}")
        if pairs.broken:
            said.append(f"{pairs.broken} {_seeds(pairs.broken)} without a finite figure")
        left = f"without {' and '.join(said)}" if said else ""
        notes = [f"seeds of {self.several}" if self.several else "", left]
        return f" [{', '.join(filter(None, notes))}]" if any(notes) else ""


def _seeds(count: int) -> str:
    return "seed" if count == 1 else "seeds"


def compared(task: Task) -> list[Compared]:
    """Every comparison of a task with full attention; none where nothing may be said of the task at all."""
    return [] if task.obstacles() else compare(task)


def compare(task: Task) -> list[Compared]:
    """The same with the obstacles of the task as refusals. All that is said of a task on one page, here and in the
    matrix of `advice`, is of these verdicts, so that it is one family."""
    found = []
    for stratum in task.strata:
        family = task.family(stratum)
        verdicts = judge({str(place): each.pairs for place, each in enumerate(family)}, margin(task.metric))
        why = next(iter(stratum.hindered(len(family))), None)
        for each, verdict in zip(family, verdicts.values()):
            if any(each is mine for mine in stratum.comparisons):
                refusal = why or _refusal(stratum, each.learnt)
                found.append(Compared(stratum, each, verdict, refusal, len(family)))
    return found


def _refusal(task: Task, each: Learnt) -> str | None:
    """Why nothing may be said of one mechanism, whatever its seeds show."""
    if apart := task.apart(each):
        return f"its runs differ from those of full in more than the mechanism ({', '.join(apart)})"
    why = task.undertrained(each)
    return None if why is None else f"undertrained, it {why}"


def sentence(task: Task) -> str:
    """All that is said of a task's mechanisms, beside what they reached."""
    length = f" ({task.seq_len:,} tokens)" if task.seq_len else ""
    start = f"On {task.named}{length}, {task.judged}: "
    found = compared(task)
    many = [each for stratum in task.strata for each in stratum.learnt if each.rows] if found else task.learnt
    told = _told(task, many)
    rest = sum(bool(each.rows) for each in many) - len(told)
    more = [f"{rest:,} more, in the table"] if rest else []
    if not found:
        figures = [f"{each.label} {each.words()}" for each in told]
        obstacles = task.obstacles()
        tail = f" ({'; '.join(obstacles)})" if obstacles else ""
        return f"{start}{units.listed([*figures, *more])}{tail}."
    parts = []
    for learnt in told:
        own = [each for each in found if each.learnt is learnt]
        where = f" [seeds of {where}]" if not own and (where := several(learnt.places)) else ""
        value = value_words(learnt.mean, task.metric) if own else learnt.words()
        parts.append(", ".join([f"{learnt.label} {value}{where}", *(f"{each.where}{each.words()}" for each in own)]))
    return f"{start}{'; '.join([*parts, *more])}."


def _told(task: Task, many: Sequence[Learnt]) -> list[Learnt]:
    """What a sentence names: all, or, of more than anyone reads in one, full attention and the best."""
    learnt = [each for each in many if each.rows]
    if len(learnt) <= MOST_TOLD:
        return learnt
    references = [task.full, *(stratum.full for stratum in task.strata)]
    full = [each for each in learnt if any(each is one for one in references)]
    sign = 1 if task.lower_is_better else -1
    best = sorted((each for each in learnt if each not in full), key=lambda each: sign * (each.mean or 0.0))
    kept = {id(each) for each in (*full, *best[: max(0, MOST_TOLD - len(full))])}
    return [each for each in learnt if id(each) in kept]


def verdicts_table(task: Task) -> Table:
    """A line for each comparison with full attention; no line where nothing may be said of the task."""
    headers = ["", "reached", "seeds in pairs", "difference from full", "95 % interval", "verdict"]
    cells = []
    for each in compared(task):
        seeds = " of ".join(filter(None, [str(len(each.verdict.pairs)), each.several]))
        name = ", ".join(filter(None, [each.learnt.label, each.where.strip()]))
        reached = value_words(each.comparison.value, task.metric)
        cells.append([name, reached, seeds, each.difference, each.interval, each.words()])
    return Table(headers, cells)
