"""What the quality rows say: one figure per task and mechanism over its seeds, and why none may be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from attention_zoo.report import convergence, groups, machines, units
from attention_zoo.report import rows as results
from attention_zoo.report.comparisons import Comparison, comparisons
from attention_zoo.report.endings import by_its_judge, ended
from attention_zoo.report.groups import COMPRESS, shortening
from attention_zoo.report.learnt import Learnt
from attention_zoo.report.metrics import (
    PRIMARY,
    RESULT,
    SETS,
    SHARES,
    margin,
    metric_words,
    seeds_words,
    spoken,
    value_words,
)
from attention_zoo.results.row import Row

LEARNT = 0.95
"""Accuracy that full attention must reach before a recall task tells mechanisms apart, and each within its reach."""
PARITY = 1.10
"""Models whose parameter counts differ by more than this factor are called out."""


@dataclass(frozen=True)
class Task:
    """All mechanisms on one task at one sequence length.

    Fields:
        name: of the task.
        seq_len: tokens of a row; 0 where no run lived to tell.
        metric: by which runs are judged.
        learnt: the groups of runs, those of each place apart.
        variation: in what it differs from other tasks of its name and length; mostly nothing.
        better: whether a "higher" or a "lower" metric is better, as the rows say; None: they do not.
        stratum: whether this is one of the `strata` of a task, whose groups may be of several places.
    """

    name: str
    seq_len: int
    metric: str
    learnt: list[Learnt]
    variation: str = ""
    better: str | None = None
    stratum: bool = False

    @property
    def lower_is_better(self) -> bool:
        return PRIMARY.get(self.metric, True) if self.better is None else self.better == "lower"

    @property
    def bars(self) -> dict[str, float]:
        """What trivial rules reach on the set of the result, and a blind guess, by name."""
        rows = [row for each in self.learnt for row in each.rows]
        best = min if self.lower_is_better else max
        found: dict[str, float] = {}  # where documents were shortened for some, rules may reach more on what is left
        for row in rows:
            for name, value in (row.get("baselines") or {}).items():
                said = spoken(name)
                found[said] = best(found.get(said, float(value)), float(value))
        chance = next((row["chance"] for row in rows if row.get("chance") is not None), None)
        return found if chance is None else {**found, "chance": chance}

    @property
    def further(self) -> dict[str, dict[str, float]]:
        """Metrics beside the main one and the loss, and what trivial rules reach by them."""
        rows = [row for each in self.learnt for row in each.rows]
        names = dict.fromkeys(name for row in rows for name in row["metrics"])
        bars: Any = next((row["further_baselines"] for row in rows if row.get("further_baselines")), {})
        plain = {self.metric, "loss"} | ({"accuracy"} if self.metric in PRIMARY and self.lower_is_better else set())
        return {name: dict(bars.get(name, {})) for name in names if name not in plain and not name.endswith("_loss")}

    @property
    def bar(self) -> tuple[str, float] | None:
        """The best of the trivial rules: a model that is worse has learnt less than they know."""
        best = min if self.lower_is_better else max
        return best(self.bars.items(), key=lambda item: item[1]) if self.bars else None

    def beats(self, value: float | None, bar: float) -> bool:
        return value is not None and (value < bar if self.lower_is_better else value > bar)

    @property
    def named(self) -> str:
        return f"{self.name} ({self.variation})" if self.variation else self.name

    @property
    def title(self) -> str:
        return f"{self.named}, {self.seq_len:,} tokens" if self.seq_len else self.named

    @property
    def sets(self) -> list[str]:
        """Names of the evaluation sets, that of the result first."""
        rows = [row for each in self.learnt for row in each.rows]
        names = list(dict.fromkeys(name for row in rows for name in row.get("evaluations") or {}))
        return sorted(names, key=lambda name: name != RESULT)

    @property
    def main(self) -> str | None:
        """The evaluation set by which runs are judged, in words; None where no row names one."""
        return SETS.get(self.sets[0], f"“{spoken(self.sets[0])}”") if self.sets else None

    @property
    def brief(self) -> str:
        """The metric, and the set where it is not the only kind that there is, a test set: where room is short."""
        main = self.sets[0] if self.sets else "test"
        plain = main == "test" or main.startswith("length")
        return metric_words(self.metric) + ("" if plain else f", {spoken(main)}")

    @property
    def judged(self) -> str:
        """The metric and the set that it was taken on."""
        return metric_words(self.metric) + (f" on {self.main}" if self.main else "")

    @property
    def full(self) -> Learnt | None:
        """The reference: full attention. Of several groups of it the first that reads whole documents, and not the
        best, which would be chosen by what it is then compared in."""
        found = [each for each in self.learnt if each.backend == "full" and each.rows]
        return min(found, key=lambda each: each.reads_less) if found else None

    @property
    def others(self) -> list[Learnt]:
        """All that is compared with the reference, whether or not anything can be said of it."""
        return [each for each in self.learnt if each.rows and each is not self.full]

    @cached_property
    def strata(self) -> list[Task]:
        """The same by what may be compared: each with a full attention of its own, seeds of several machines pooled.
        Mostly this task alone."""
        many = [] if self.stratum else machines.strata(self.learnt)
        if not many or (len(many) == 1 and all(each is mine for each, mine in zip(many[0], self.learnt))):
            return [self]
        return [replace(self, learnt=each, stratum=True) for each in many]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """All of one stratum."""
        return [] if self.full is None else comparisons(self.name, self.metric, self.others, self.full)

    def family(self, stratum: Task) -> list[Comparison]:
        """All that are judged together with those of a stratum: of every other one, too, but where single seeds tell
        nothing whatever they are."""
        told = [each for each in self.strata if each is stratum or any(len(one.pairs) > 1 for one in each.comparisons)]
        return [one for each in told for one in each.comparisons]

    def apart(self, each: Learnt) -> list[str]:
        """In what the runs of a mechanism differ from those of the reference beside the mechanism itself."""
        return [] if self.full is None else machines.apart(self.full, each)

    def undertrained(self, each: Learnt) -> str | None:
        """Why the trainings of a mechanism were too short to tell what it can learn; None where they were not."""
        value = each.mean
        if self.bar is not None and self.metric.startswith("bits_") and not self.beats(value, self.bar[1]):
            return f"reached {value_words(value, self.metric)}, {self.bar[0]} {value_words(self.bar[1], self.metric)}"
        # who is within the margin of all answers has no more to learn than counts as a difference
        whole = self.metric in SHARES and value is not None and value >= 1 - (margin(self.metric) or 0.0)
        share = None if whole else convergence.still_learning(each.rows)
        if share is not None and share > convergence.LEVEL:
            of = f"{units.percent(share)} of the whole fall of its loss came in the last fifth of its steps"
            return f"was still learning: {of}, above {convergence.LEVEL:.0%}"
        near = convergence.within_reach(each.rows) if self.metric in SHARES else None
        if near is not None and near[0] < LEARNT:
            right, far = near
            return f"reached {units.percent(right)} within the {far} tokens that it surely sees, below {LEARNT:.0%}"
        return None

    def obstacles(self) -> list[str]:
        """Why nothing may be said of differences between mechanisms on this task; empty where something may."""
        asked = [each for each in self.strata if each.others or len(self.strata) == 1]
        many = [each.hindered(len(self.family(each))) for each in asked]
        return [] if any(not each for each in many) else list(dict.fromkeys(why for each in many for why in each))

    def hindered(self, comparisons: int) -> list[str]:
        """The same of one stratum.

        Args:
            comparisons: of the family, for the seeds that it takes.
        """
        found = []
        full, others = self.full, self.others
        if full is None:
            found.append("no verdict: no full attention to compare with")
        elif why := self._full_undertrained(full):
            found.append(f"undertrained, no verdict: full attention itself {why}")
        rows = [row for each in self.learnt for row in each.rows]
        unlike = [self.apart(each) for each in others]
        if unlike and all(unlike):
            keys = ", ".join(dict.fromkeys(key for each in unlike for key in each))
            found.append(f"no verdict: the runs differ in more than the mechanism ({keys})")
        if self.metric not in PRIMARY and self.better is None:
            found.append(f"no verdict: nobody says whether more {metric_words(self.metric)} is better")
        cut = [f"{each.label} {each.span('steps', units.count)}" for each in self.learnt if each.cut_short]
        if cut:
            found.append(
                f"unequal training, no verdict: time was over before the planned steps ({', '.join(cut)} steps)"
            )
        if any(ended(row, "stop_at") for row in rows):
            found.append("no verdict: runs were ended at a figure (stop_at), at which those that reach it are alike")
        if any(by_its_judge(row) for row in rows):
            found.append("no verdict: runs were stopped by the set that they are judged by")
        if full is not None and others and not any(full.paired(each) > 1 for each in others):
            found.append(f"no verdict: one seed shows no difference, {seeds_words(comparisons)}")
        return found

    def _full_undertrained(self, full: Learnt) -> str | None:
        """The same of the reference, which has to beat every trivial rule, and to learn recall nearly whole."""
        value = full.mean
        if self.bar is not None and not self.beats(value, self.bar[1]):
            return f"reached {value_words(value, self.metric)}, {self.bar[0]} {value_words(self.bar[1], self.metric)}"
        if self.metric in SHARES and (value or 0.0) < LEARNT:
            return f"reached {units.percent(value)}, below {LEARNT:.0%}"
        return self.undertrained(full)

    def shortened(self) -> str | None:
        """A sentence on documents that were shortened before a model read them, None where none were."""
        found = dict.fromkeys(_kept(row) for each in self.learnt for row in each.rows if shortening(row))
        some = any(each.reads_less for each in self.learnt)
        where = " where a name says so" if some else ""
        return f"Text was shortened{where}: {'; '.join(found)}." if found else None

    def parity(self) -> str | None:
        """A sentence on models of unequal size, None when all are within 10 % of full (or of the smallest)."""
        sizes: dict[str, int] = {
            each.label: max(row.get("parameters") or 0 for row in each.rows)
            for each in self.learnt
            if any(row.get("parameters") for row in each.rows)
        }
        if not sizes:
            return None
        reference = sizes.get(self.full.label, min(sizes.values())) if self.full else min(sizes.values())
        name = self.full.label if self.full else "the smallest"
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
    """The tasks among quality rows, text first. Other options of a task, or other data, make it another task; but how
    its documents were shortened does not, as long as the same is scored: as long as the digest of the data is the same.
    """
    by_name: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["kind"] == "quality":
            by_name.setdefault((_name(row), int(row.get("seq_len") or 0)), []).append(row)
    found = []
    for (name, seq_len), members in by_name.items():
        parts = _parts(members)
        facts = [dict(part) | _alike(held) for part, held in parts.items()]
        keys = groups.differing(facts)
        said = groups.apart([", ".join(groups.words(fact, keys)) for fact in facts])
        found += [_task(name, seq_len, part, words) for part, words in zip(parts.values(), said)]
    preference = list(PRIMARY)
    place = {metric: number for number, metric in enumerate(preference)}
    return sorted(found, key=lambda task: (place.get(task.metric, len(place)), task.name, task.seq_len, task.variation))


def names_apart(tasks: Sequence[Task]) -> list[str]:
    """What each task is called beside the others: with its length where one name stands at several lengths."""
    often = Counter(task.named for task in tasks)
    return [task.title if often[task.named] > 1 else task.named for task in tasks]


def _name(row: Row) -> str:
    """The name of a row's task; a run that ended before it was built tells by its config."""
    config = (row.get("config") or {}).get("task")
    target = str(config.get("_target_") or "") if isinstance(config, dict) else ""
    return str(row.get("task") or target.rpartition(".")[2].lower() or "unknown task")


def _parts(members: list[Row]) -> dict[tuple[tuple[str, str], ...], list[Row]]:
    """Rows of one task's name by its options and its data. A run that ended before it saw its data goes with those of
    its options that did."""
    parts: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in sorted(members, key=lambda row: not row.get("data")):
        config = (row.get("config") or {}).get("task")
        options = {key: value for key, value in config.items() if key != COMPRESS} if isinstance(config, dict) else {}
        facts = tuple(sorted(groups.flat(options)))
        data = row.get("data")
        if data:
            facts += (("data", str(data.get("digest") or json.dumps(data, sort_keys=True))),)
        elif not results.ok(row):
            near = [part for part in parts if part[: len(facts)] == facts]
            near.sort(key=lambda part: all(shortening(other) != shortening(row) for other in parts[part]))
            facts = near[0] if near else facts
        parts.setdefault(facts, []).append(row)
    return parts


def _kept(row: Row) -> str:
    """How the documents of a training were shortened, and how much that left."""
    said, data = shortening(row), row.get("data") or {}
    about = data.get(COMPRESS)
    about = about if isinstance(about, dict) else data
    share, short, every = (about.get(key) for key in ("kept_share", "shortened", "documents"))
    if isinstance(share, int | float):
        most = "at most " if said.startswith("extractive") else ""
        said += f", {most}{units.percent(share)} of bytes kept"
    if isinstance(short, int) and isinstance(every, int):
        said += f", {units.count(short)} of {units.count(every)} documents shortened"
    return said


def _alike(members: list[Row]) -> dict[str, str]:
    """How the documents of all these rows were shortened, where it is the same for all and not nothing."""
    how, *others = {shortening(row) for row in members}
    return {COMPRESS: how} if how and not others else {}


def _task(name: str, seq_len: int, members: list[Row], variation: str) -> Task:
    finished = [row for row in members if results.ok(row)]
    own = [row["metric"] for row in finished if row.get("metric")]
    known = dict.fromkeys([*own, *PRIMARY, *(key for row in finished for key in row["metrics"])])
    better = next((row["better"] for row in finished if row.get("better")), None)
    metric = next((key for key in known if any(key in row["metrics"] for row in finished)), "loss")
    found = groups.gather(members)
    learnt = []
    for label, (group, mine) in zip(groups.labels(list(found), {}), found.items()):
        good = [row for row in mine if results.ok(row) and metric in row["metrics"]]
        lost = [row for row in mine if not results.ok(row) or metric not in row["metrics"]]
        learnt.append(Learnt(group.backend, label, good, lost, metric, group))
    return Task(
        name, seq_len, metric, sorted(learnt, key=lambda each: (each.backend != "full", each.label)), variation, better
    )
