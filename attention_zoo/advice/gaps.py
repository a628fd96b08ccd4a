"""What a mechanism learnt beside full attention, by kind of problem: the cells of the matrix.

Verdicts are those of the report (`report.verdicts`): all comparisons of one task are one family, paired by seed, so
that of all that a page says of it at one length nothing is false with 95 %, here or there. Where the report gives no
verdict there is no figure of a gap either, but "not known" and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from attention_zoo.advice.kinds import Kind, answers
from attention_zoo.advice.lines import OWN, Line, line_of, positions_of
from attention_zoo.report import quality, units
from attention_zoo.report.comparisons import Score, edge_of, mean, scores
from attention_zoo.report.learnt import Learnt, missing
from attention_zoo.report.machines import several
from attention_zoo.report.metrics import could_words, difference_words, margin_words, seeds_words, value_words
from attention_zoo.report.quality import Task
from attention_zoo.report.rows import FROM
from attention_zoo.report.verdicts import Compared, compare
from attention_zoo.results.row import Row
from attention_zoo.statistics import Verdict

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
        others: verdicts of other rows of the same mechanism on the same, where they are not this one.
        several: "2 machines", where its seeds are of several places; "" of one.
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
    several: str = ""
    others: tuple[str, ...] = ()

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
        of = f" [seeds of {self.several}]" if self.several else ""
        reached = f"{value_words(self.value, self.task.metric)}{of}"
        if self.reference and self.value is None:
            return "nothing lies there"
        if self.reference:
            return reached if self.why is None else f"{reached} ({self.brief})"
        if not self.known:
            return f"not known: {self.brief}" + ("" if self.value is None else f"; reached {reached}")
        return f"{self.gap_words()}, {self.verdict_words}{of}"

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
        seeds, of = len(self.verdict.pairs) if self.verdict else 0, f" of {self.several}" if self.several else ""
        could = f"; {shown}" if self.judged is None and (shown := self._could_show()) else ""
        beside = "".join(f"; other rows say {each}" for each in self.others)
        return f"{said}, gap {self.gap_words()}, 95 % interval of {seeds} seeds{of}{self._positions()}{could}{beside}"

    def beside(self, other: Gap) -> Gap:
        """With what another task's rows say, where their verdict is another."""
        if not (self.known and other.known) or self.verdict_words == other.verdict_words or other.verdict is None:
            return self
        files = ", ".join(dict.fromkeys(str(row.get(FROM) or "") for row in other.rows))
        told = f"{other.verdict_words}, gap {other.gap_words()}, {len(other.verdict.pairs)} seeds ({files})"
        return replace(self, others=(*self.others, told))

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
    every = quality.tasks(rows)
    held = Counter((file, task.name, task.seq_len) for task in every for file in _files(task))
    found: dict[tuple[Line, str], Gap] = {}
    for task in every:
        said = compare(task)
        for stratum in task.strata:
            alone = all(held[file, task.name, task.seq_len] == 1 for file in _files(stratum))
            named = replace(stratum, variation="", stratum=True) if alone else stratum  # other files name it anyhow
            mine = [each for each in said if each.task is stratum]
            for gap in columns(
                named, [kind for kind in kinds if answers(stratum, kind)], mine, len(task.family(stratum))
            ):
                cell = gap.line, gap.kind.key
                before = found.get(cell, gap)
                first, second = (gap, before) if _order(gap) > _order(before) else (before, gap)
                found[cell] = first if first is second else replace(first, others=before.others).beside(second)
    return {cell: gap for kind in kinds for cell, gap in found.items() if cell[1] == kind.key}


def _files(task: Task) -> set[str]:
    return {str(row.get(FROM) or "") for each in task.learnt for row in (*each.rows, *each.failed)}


def _order(gap: Gap) -> tuple[bool, int]:
    return gap.known, len(gap.rows)


def columns(task: Task, kinds: Sequence[Kind], said: Sequence[Compared], family: int) -> list[Gap]:
    """All cells of one task in the columns that it answers.

    Args:
        task: or a stratum of one.
        kinds: the columns.
        said: what the report says of it.
        family: how many comparisons were judged together.
    """
    full, reasons, found = task.full, task.hindered(family), []
    for kind in kinds:
        for each in task.learnt:
            if not each.rows:
                lost = ", ".join(dict.fromkeys(missing(row) for row in each.failed))
                found.append(Gap(kind, line_of(each.failed[0]), lost, task, rows=each.failed))
                continue
            edge = None if kind.part == "all" else edge_of(each)
            own, theirs = ([] if one is None else scores(one, kind.part, edge) for one in (each, full))
            told = next((one for one in said if one.learnt is each and one.comparison.part == kind.part), None)
            why = reasons[0] if reasons else _refusal(task, each, kind, own, family, told)
            rows = [*each.rows, *(full.rows if full is not None and full is not each else [])]
            verdict = None if told is None else told.verdict
            places = several(each.places) if told is None else told.several
            line = line_of(each.rows[0])
            found.append(Gap(kind, line, why, task, mean(own), mean(theirs), verdict, edge, rows, family, places))
    return found


def _refusal(
    task: Task, each: Learnt, kind: Kind, own: Sequence[Score], family: int, told: Compared | None
) -> str | None:
    """Why nothing is known of one mechanism where something may be of others."""
    if not own and each.group and kind.part != "all" and edge_of(each) is None:
        reached = value_words(mean(scores(each, "all", None)), task.metric)
        return f"how far it sees is not known, so that its recall is not told by distance (in all: {reached})"
    if not own:
        where = {"within": "within its reach", "beyond": "beyond its reach"}.get(kind.part, "")
        return f"no answer {where} was scored" if each.group else NO_ROWS
    if each is task.full:
        return None
    if apart := task.apart(each):
        return f"its runs differ from those of full in more than the mechanism ({', '.join(apart)})"
    if undertrained := task.undertrained(each):
        return f"undertrained: it {undertrained}"
    verdict = None if told is None else told.verdict
    if verdict is None or not len(verdict.pairs):
        return f"no seed in common with full, {seeds_words(family)}"
    if len(verdict.pairs) == 1:
        return f"one seed shows no difference, {seeds_words(family)}"
    if not verdict.pairs.spread and not (verdict.different or verdict.equivalent):
        return f"the same difference in all {len(verdict.pairs)} seeds tells no spread, {seeds_words(family)}"
    return None
