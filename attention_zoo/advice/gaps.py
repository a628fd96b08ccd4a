"""What a mechanism learnt beside full attention, by kind of problem: the cells of the matrix.

All columns of one task and file are one family, paired by seed, so that of all that is said of it at one length
nothing is false with 95 % (see `statistics`): recall within and beyond reach are two comparisons of each mechanism.
Where the report gives no verdict there is no figure of a gap either, but "not known" and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from attention_zoo.advice.kinds import KINDS, Kind, answers
from attention_zoo.advice.lines import OWN, Line, line_of, positions_of
from attention_zoo.advice.reach import accuracy, reach_of
from attention_zoo.report import quality, units
from attention_zoo.report.metrics import could_words, difference_words, margin, margin_words, seeds_words, value_words
from attention_zoo.report.quality import Learnt, Task
from attention_zoo.report.rows import FROM
from attention_zoo.results.row import Row
from attention_zoo.statistics import Pairs, Verdict, judge

Scores = list[tuple[object, float]]

NO_ROWS = "no rows"
SHORT = (
    ("undertrained", "undertrained"), ("no verdict: one seed", "one seed"), ("no verdict: the runs", "runs differ"),
    ("unequal training", "unequal training"), ("no verdict: no full", "no full attention beside"),
    ("no verdict: runs were ended", "ended at a figure"), ("its runs differ", "runs differ"),
    ("one seed", "one seed"), ("no seed", "no seed in common"), ("the same difference", "too few seeds"),
)  # fmt: skip
"""Why nothing is known, in a word for a table, by how the sentence begins."""


@dataclass(frozen=True)
class Gap:
    """One cell.

    Fields:
        kind: the column.
        line: the mechanism.
        why: why the gap is not known; None where it is.
        task: where the figures are from; None without rows.
        value: what the mechanism reached, the mean over seeds.
        full: what full attention did on the same answers.
        verdict: of the tests; None where there are none.
        edge: up to which distance answers are within reach, in columns that ask that.
        rows: what all of this rests on, full attention's last.
        family: how many comparisons are judged together with this one.
    """

    kind: Kind
    line: Line
    why: str | None
    task: Task | None = None
    value: float | None = None
    full: float | None = None
    verdict: Verdict | None = None
    edge: int | None = None
    rows: Sequence[Row] = field(default_factory=list)
    family: int = 0

    @property
    def known(self) -> bool:
        return self.why is None and self.verdict is not None

    @property
    def reference(self) -> bool:
        """Whether this is full attention itself, whose gap is none."""
        return self.task is not None and self.task.full is not None and line_of(self.task.full.rows[0]) == self.line

    @property
    def judged(self) -> str | None:
        """better | worse | as good | None: these seeds show nothing."""
        if not self.known or self.verdict is None or self.task is None:
            return None
        if self.verdict.different:
            return "better" if ((self.verdict.pairs.mean or 0.0) < 0) == self.task.lower_is_better else "worse"
        return "as good" if self.verdict.equivalent else None

    @property
    def as_good(self) -> bool:
        """Whether it is shown to be within the margin, or better; a difference may be shown as well."""
        return self.known and self.verdict is not None and (self.verdict.equivalent or self.judged == "better")

    @property
    def verdict_words(self) -> str:
        also = ", and yet as good" if self.judged == "worse" and self.as_good else ""
        return f"{self.judged or 'not told apart'}{also}"

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.verdict is None else self.verdict.pairs.interval()

    def gap_words(self) -> str:
        """The difference from full with its interval."""
        assert self.verdict is not None
        assert self.task is not None
        mean, metric = self.verdict.pairs.mean, self.task.metric
        said = units.NONE if mean is None else difference_words(mean, metric, signed=True)
        if (found := self.interval) is None:
            return said
        low, high = (difference_words(end, metric, signed=True, unit=False) for end in found)
        return f"{said} ({low} to {high})"

    def words(self) -> str:
        """The cell in a table."""
        if self.task is None:
            return f"not known: {NO_ROWS}"
        reached = value_words(self.value, self.task.metric)
        if self.reference and self.value is None:
            return "nothing lies there"
        if self.reference:
            return reached if self.why is None else f"{reached} ({self.brief})"
        if not self.known:
            return f"not known: {self.brief}" + ("" if self.value is None else f"; reached {reached}")
        return f"{self.gap_words()}, {self.verdict_words}"

    @property
    def brief(self) -> str:
        why = self.why or ""
        return next((word for start, word in SHORT if why.startswith(start)), why or "too few seeds")

    def plainly(self) -> str:
        """The end of a sentence: how it learnt this."""
        assert self.task is not None
        metric = self.task.metric
        if not self.known:
            return f"not known: {(self.why or '').removeprefix('no verdict: ')}"
        within = f"within ± {margin_words(metric)}"
        said = {
            "better": "better than full attention", "worse": "worse than full attention",
            "as good": f"as good as full attention {within}", None: "not told apart from full attention",
        }[self.judged]  # fmt: skip
        said += f", and yet as good {within}" if self.judged == "worse" and self.as_good else ""
        seeds = len(self.verdict.pairs) if self.verdict else 0
        could = f"; {shown}" if self.judged is None and (shown := self._could_show()) else ""
        return f"{said}, gap {self.gap_words()}, 95 % interval of {seeds} seeds{self._positions()}{could}"

    def _positions(self) -> str:
        """That not the pattern alone is another where a mechanism brings positions: they may be all of the gap."""
        full = self.task.full if self.task is not None else None
        theirs = None if full is None else positions_of(full.rows[0])
        if theirs is None or theirs == OWN or positions_of(self.rows[0]) != OWN:
            return ""
        return ", with positions of its own where full attention has " + (
            "none" if theirs == "none" else f"{theirs} ones"
        )

    def _could_show(self) -> str | None:
        """What these seeds could have shown, and how many would show the gap seen."""
        if self.task is None or self.verdict is None or self.verdict.detectable is None:
            return None
        return could_words(self.verdict, self.task.metric)


def gaps(rows: Iterable[Row], kinds: Sequence[Kind]) -> dict[tuple[Line, str], Gap]:
    """Every cell that any row has something to say of, by line and key of the column.

    Of several tasks that answer one column, such as those of several files, a line is told by the one with a verdict,
    then by the one with most seeds.
    """
    files: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "quality":
            files.setdefault(str(row.get(FROM) or ""), []).append(row)
    every = [task for many in files.values() for task in quality.tasks(many)]
    found: dict[tuple[Line, str], Gap] = {}
    for task in every:
        # also those that nobody asks for: what is said of a column depends on the rows alone
        answered = [kind for kind in dict.fromkeys([*KINDS, *kinds]) if answers(task, kind)]
        for gap in columns(task, answered):
            before = found.get((gap.line, gap.kind.key))
            if gap.kind in kinds and (before is None or _order(gap) > _order(before)):
                found[gap.line, gap.kind.key] = gap
    return {cell: gap for kind in kinds for cell, gap in found.items() if cell[1] == kind.key}


def _order(gap: Gap) -> tuple[bool, int]:
    return gap.known, len(gap.rows)


def columns(task: Task, kinds: Sequence[Kind]) -> list[Gap]:
    """All cells of one task in the columns that it answers."""
    full, found = task.full, []
    family: dict[str, Pairs] = {}
    for kind in kinds:
        for each in task.others:
            own, theirs = _beside(each, full, kind)
            if own and theirs:  # a mechanism that is never asked takes no part in the family
                family[_cell(each, kind)] = Pairs.of(own, theirs)
    verdicts, reasons = judge(family, margin(task.metric)), task.obstacles(len(family))
    for kind in kinds:
        for each in task.learnt:
            if not each.rows:
                lost = ", ".join(dict.fromkeys(quality.missing(row) for row in each.failed))
                found.append(Gap(kind, line_of(each.failed[0]), lost, task, rows=each.failed))
                continue
            own, theirs = _beside(each, full, kind)
            verdict = verdicts.get(_cell(each, kind))
            why = reasons[0] if reasons else _refusal(task, each, kind, own, len(family), verdict)
            rows = [*each.rows, *(full.rows if full is not None and full is not each else [])]
            line, edge = line_of(each.rows[0]), _edge(each, kind)
            found.append(Gap(kind, line, why, task, _mean(own), _mean(theirs), verdict, edge, rows, len(family)))
    return found


def _cell(each: Learnt, kind: Kind) -> str:
    return f"{kind.key}: {each.label}"


def _beside(each: Learnt, full: Learnt | None, kind: Kind) -> tuple[Scores, Scores]:
    """Seed and figure of the runs of a mechanism and of full attention, on the same answers."""
    edge = _edge(each, kind)
    return _by_seed(each, kind, edge), [] if full is None else _by_seed(full, kind, edge)


def _refusal(
    task: Task, each: Learnt, kind: Kind, own: Sequence[tuple[object, float]], family: int, verdict: Verdict | None
) -> str | None:
    """Why nothing is known of one mechanism where something may be of others."""
    if not own:
        where = {"within": "within its reach", "beyond": "beyond its reach"}.get(kind.part, "")
        return f"no answer {where} was scored" if each.group else NO_ROWS
    if each is task.full:
        return None
    if apart := task.apart(each):
        return f"its runs differ from those of full in more than the mechanism ({', '.join(apart)})"
    if undertrained := task.undertrained(each):
        return f"undertrained: it {undertrained}"
    if verdict is None or not len(verdict.pairs):
        return f"no seed in common with full, {seeds_words(family)}"
    if len(verdict.pairs) == 1:
        return f"one seed shows no difference, {seeds_words(family)}"
    if not verdict.pairs.spread and not (verdict.different or verdict.equivalent):
        return f"the same difference in all {len(verdict.pairs)} seeds tells no spread, {seeds_words(family)}"
    return None


def _edge(each: Learnt, kind: Kind) -> int | None:
    """The nearest edge among the runs: what is within it is so for each of them."""
    if kind.part == "all":
        return None
    known = [reach_of(row).edge for row in each.rows]
    return None if not known or None in known else min(edge for edge in known if edge is not None)


def _by_seed(each: Learnt, kind: Kind, edge: int | None) -> Scores:
    """Seed and figure of every run that has one."""
    if kind.part == "all":
        return [(row.get("seed"), value) for row, value in zip(each.rows, each.values)]
    told = [(row.get("seed"), accuracy(row, edge, beyond=kind.part == "beyond")) for row in each.rows]
    return [(seed, value) for seed, value in told if value is not None]


def _mean(values: Sequence[tuple[object, float]]) -> float | None:
    return sum(value for _, value in values) / len(values) if values else None
