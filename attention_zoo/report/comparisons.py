"""What is compared with full attention: the one list of comparisons behind everything that is said of a task.

That is each mechanism once, by the metric of the task; but recall is told within and beyond the mechanism's own reach,
for the whole says no more than how many questions were of which side. The whole of a recall task is a comparison of its
own only where answers by distance are not those that it is of, or only one side was asked and not all are there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from attention_zoo.report.groups import Place, place_of
from attention_zoo.report.learnt import Learnt
from attention_zoo.report.reach import BY_REACH, accuracy, reach_of
from attention_zoo.results.row import Row
from attention_zoo.statistics import Pairs

Part = Literal["all", "within", "beyond"]
SIDES: tuple[Part, Part] = ("within", "beyond")
Score = tuple[Any, Place, float]
"""Seed, place and figure of a run."""
_ROUNDING = 1e-4
"""Of an accuracy that is summed up from shares."""


@dataclass(frozen=True)
class Comparison:
    """One mechanism beside full attention, on one part of the answers.

    Fields:
        learnt: the mechanism.
        part: all answers, or those within or beyond its reach.
        edge: up to which distance answers are within reach; None of all answers.
        pairs: its differences from full attention, a seed each.
        own, theirs: seed, place and figure of its runs and of full attention's.
    """

    learnt: Learnt
    part: Part
    edge: int | None
    pairs: Pairs
    own: Sequence[Score] = field(repr=False)
    theirs: Sequence[Score] = field(repr=False)

    @property
    def value(self) -> float | None:
        """What the mechanism reached: the mean over its runs."""
        return mean(self.own)

    @property
    def places(self) -> set[Place]:
        """Where its pairs were made."""
        mine, full = ({(seed, place) for seed, place, _ in many} for many in (self.own, self.theirs))
        return {place for _, place in mine & full}


def comparisons(task: str, metric: str, others: Sequence[Learnt], full: Learnt) -> list[Comparison]:
    """Of every mechanism of a task, in their order.

    Args:
        task: its name.
        metric: by which it is judged.
        others: the mechanisms.
        full: full attention.
    """
    recall = task in BY_REACH and metric == "accuracy"
    return [found for each in others for found in (_by_reach if recall else _whole)(each, full)]


def _whole(each: Learnt, full: Learnt) -> list[Comparison]:
    return [_of(each, full, "all", None)]


def _by_reach(each: Learnt, full: Learnt) -> list[Comparison]:
    edge, whole = edge_of(each), _whole(each, full)
    sides = [_of(each, full, part, edge) for part in SIDES]
    sides = [side for side in sides if side.own and side.theirs]  # who is never asked on a side takes no part in it
    told = bool(sides) and all(_adds_up(row) for row in (*each.rows, *full.rows))
    if told and len(sides) == 1:  # which has to be of all answers then
        told = all(map(_near, _figures(sides[0]), _figures(whole[0])))
    return sides if told else whole + sides


def _of(each: Learnt, full: Learnt, part: Part, edge: int | None) -> Comparison:
    own, theirs = scores(each, part, edge), scores(full, part, edge)
    return Comparison(each, part, edge, pairs_of(own, theirs), own, theirs)


def _figures(found: Comparison) -> list[float]:
    return [value for *_, value in (*found.own, *found.theirs)]


def edge_of(each: Learnt) -> int | None:
    """The nearest edge among the runs: what is within it is so for each of them. None where any does not say."""
    known = [reach_of(row).edge for row in each.rows]
    return None if not known or None in known else min(edge for edge in known if edge is not None)


def scores(each: Learnt, part: Part, edge: int | None) -> list[Score]:
    """Of every run that has a figure of this part."""
    if part == "all":
        return [(row.get("seed"), place_of(row), value) for row, value in zip(each.rows, each.values)]
    told = [(row, accuracy(row, edge, beyond=part == "beyond")) for row in each.rows]
    return [(row.get("seed"), place_of(row), share) for row, share in told if share is not None]


def mean(many: Sequence[Score]) -> float | None:
    return sum(value for *_, value in many) / len(many) if many else None


def pairs_of(own: Sequence[Score], theirs: Sequence[Score]) -> Pairs:
    """By seed, each pair of one place."""
    places = dict.fromkeys(place for _, place, _ in (*own, *theirs))
    return Pairs.over((_at(place, own), _at(place, theirs)) for place in places)


def _at(place: Place, many: Sequence[Score]) -> list[tuple[Hashable, float]]:
    return [(seed, value) for seed, where, value in many if where == place]


def _adds_up(row: Row) -> bool:
    """Whether the answers of a run that are told by distance are those that its accuracy is of."""
    groups = (row.get("by_group") or {}).get("distance") or []
    asked = sum(count for *_, count in groups)
    right = sum(share * count for _, share, _, count in groups)
    return bool(asked) and _near(right / asked, row["metrics"]["accuracy"])


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _ROUNDING
