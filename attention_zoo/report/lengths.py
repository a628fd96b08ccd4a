"""Up to which length a trained model holds what it learnt, from rows alone: its effective length, by two rules.

| rule | a length holds where accuracy is | of |
|---|---|---|
| of its own | at least `SHARE` of that at the trained length | what was trained here, whatever it reached |
| fixed | at least a level, the same for all | RULER (Hsieh et al. 2024, §4), whose level is Llama2-7B at 4K: `RULER` |

By both, every shorter length that was tested must hold, too: an island behind a collapse is no reach. Accuracy is the
mean over seeds. Sets that were scored under another mechanism (`evaluate_at` with `attention`) say nothing of these
weights' length and are left out, as are sets of other text or those looked at in training; where several are as long,
the result's own counts, else the lowest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from attention_zoo.report import units
from attention_zoo.report.learnt import Learnt
from attention_zoo.report.metrics import RESULT, SHARES
from attention_zoo.report.quality import Task
from attention_zoo.results.row import Row
from attention_zoo.training.conditions import SEPARATOR

SHARE = 0.85
"""Of the accuracy at the trained length."""
LEVEL = 0.85
"""The fixed threshold where none is given."""
RULER = 0.856
"""RULER's fixed threshold: accuracy of Llama2-7B at 4,096 tokens (Hsieh et al. 2024, "RULER", table 3)."""
_NAMED = re.compile(r"(?:^|[ _])length[ _](\d+)(?:$|[ _@])")
_ASIDE = ("validation", "held_out")


class Effective(NamedTuple):
    """An effective length.

    Fields:
        length: the longest tested one up to which all hold.
        falls: whether a longer one was tested, and does not hold.
    """

    length: int
    falls: bool

    def words(self) -> str:
        """ "256", or "> 1,024" where it never falls."""
        return ("" if self.falls else "> ") + units.count(self.length)


def lengths_of(row: Row) -> dict[str, int]:
    """How many tokens the rows of each evaluation set have: what the row says of it, else what the set's name does."""
    told = row.get("by_set") or {}
    found: dict[str, int] = {}
    for name in row.get("evaluations") or {}:
        named, length = _NAMED.search(name), (told.get(name) or {}).get("seq_len")
        if length or named:
            found[name] = int(length or named[1])  # type: ignore[index]
    main = main_set(row)
    if main is not None and main not in found and row.get("seq_len"):
        found[main] = int(row["seq_len"])
    return found


def main_set(row: Row) -> str | None:
    """The name of the set that a run's result is of."""
    names = list(row.get("evaluations") or {})
    return RESULT if RESULT in names else next(iter(names), None)


def other_mechanism(row: Row, name: str) -> bool:
    """Whether a set was scored under another mechanism, or other options of it, than was trained."""
    entry = ((row.get("config") or {}).get("evaluate_at") or {}).get(name.partition(SEPARATOR)[2])
    return isinstance(entry, Mapping) and entry.get("attention") is not None


def by_length(row: Row, metric: str) -> dict[int, float]:
    """What a run reached at each length that it was tested at, shortest first."""
    found: dict[int, float] = {}
    main, scores = main_set(row), row.get("evaluations") or {}
    own = lengths_of(row)
    for name, length in own.items():
        value = scores.get(name, {}).get(metric)
        base = name.partition(SEPARATOR)[0]
        if value is None or other_mechanism(row, name) or (base in _ASIDE and base != main):
            continue
        # the lowest of several is what surely holds; but at its own length a run is known by its result
        if name == main or length != own.get(main or ""):
            found[length] = float(value) if name == main else min(float(value), found.get(length, float(value)))
    return dict(sorted(found.items()))


def mean_by_length(rows: Iterable[Row], metric: str) -> dict[int, float]:
    """The mean over runs at each length that all of them were tested at."""
    many = [by_length(row, metric) for row in rows]
    if not many:
        return {}
    common = [length for length in many[0] if all(length in each for each in many)]
    return {length: sum(each[length] for each in many) / len(many) for length in common}


def trained_length(rows: Iterable[Row]) -> int | None:
    """The length of the result's own set: that of training."""
    found = {lengths_of(row).get(main_set(row) or "") for row in rows}
    return found.pop() if len(found) == 1 else None


def effective_length(
    accuracy: Mapping[int, float], trained: int, *, share: float = SHARE, floor: float = 0.0
) -> Effective | None:
    """By the rule of its own.

    Args:
        accuracy: at each length.
        trained: the length whose accuracy is the base; must be among them.
        share: of the base that must be left.
        floor: what needs no model: who does not beat it at the base has learnt nothing that could be kept.

    Returns:
        None where the base is no more than `floor`, where a shorter length already does not hold, or where no other
        length was tested.
    """
    _check(share, "share")
    base = accuracy.get(trained)
    if base is None or base <= floor or len(accuracy) < 2:
        return None
    return _up_to(accuracy, trained, share * base)


def threshold_length(accuracy: Mapping[int, float], trained: int, *, level: float = LEVEL) -> Effective | None:
    """By a fixed level, `RULER` for instance.

    Returns:
        None where the base, accuracy at the trained length, is itself below, or where a shorter length is.
    """
    _check(level, "level")
    base = accuracy.get(trained)
    if base is None or base < level or len(accuracy) < 2:
        return None
    return _up_to(accuracy, trained, level)


def _check(value: float, name: str) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def _up_to(accuracy: Mapping[int, float], trained: int, least: float) -> Effective | None:
    reached = None
    for length in sorted(accuracy):
        if accuracy[length] < least:
            # a model that fails below its own length has none that one could name
            return None if reached is None or reached < trained else Effective(reached, True)
        reached = length
    return None if reached is None else Effective(reached, False)


def of(each: Learnt, task: Task) -> tuple[Effective | None, Effective | None] | None:
    """Both effective lengths of one mechanism on a task: of its own, and by `LEVEL`.

    Returns:
        None where the task is not judged by a share of right answers, or only one length was tested.
    """
    if task.metric not in SHARES or task.lower_is_better:
        return None
    accuracy, trained = mean_by_length(each.rows, task.metric), trained_length(each.rows)
    if trained is None or len(accuracy) < 2:
        return None
    floor = task.bar[1] if task.bar else 0.0
    return effective_length(accuracy, trained, floor=floor), threshold_length(accuracy, trained)


def words(found: Effective | None) -> str:
    return units.NONE if found is None else found.words()


def tested(task: Task) -> bool:
    """Whether there is anything to say of lengths."""
    return any(of(each, task) is not None for each in task.learnt if each.rows)
