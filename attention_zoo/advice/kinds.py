"""Kinds of problems: the columns of the matrix, and which rows answer each.

A figure is of the set that a run is judged by (its test set), by the task's own metric. Recall is told apart by the
distance between question and answer, see `reach`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from attention_zoo.report.quality import Task
from attention_zoo.results.row import Row
from attention_zoo.rules import near, shown

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One column.

    Fields:
        key: its word on the command line.
        title: its heading.
        task: the name of the task whose rows answer it.
        holds: whether rows of that name with these options of the task do.
        part: all answers, or those within or beyond the mechanism's own reach (group "distance").
        about: what it asks, in a line.
        short: whether all mechanisms must see everything (True), or not (False); None: either.
    """

    key: str
    title: str
    task: str
    about: str
    holds: Callable[[Options], bool] = lambda options: True
    part: Literal["all", "within", "beyond"] = "all"
    short: bool | None = None


def _copies(options: Options) -> bool:
    """A word behind a marker, once, in order; options that a row does not say are those of the task as it comes."""
    return bool(options.get("start", True)) and not options.get("reverse") and not options.get("selective")


KINDS: tuple[Kind, ...] = (
    Kind("text", "local text", "text", "bytes of text longer than the windows", short=False),
    Kind("recall_within", "recall within reach", "mqar", "a value that every query surely sees", part="within"),
    Kind("recall_beyond", "recall beyond reach", "mqar", "a value farther than that", part="beyond"),
    Kind("copy", "copy", "copy", "a word again after a gap", _copies),
    Kind("multi_hop", "multi-hop", "variable_tracking", "a value behind a chain of assignments",
         lambda options: int(options.get("hops", 1)) >= 1),
    Kind("pair", "pair at a distance", "quote", "whether a quote stands in a document; two-sided"),
    Kind("streaming", "streaming state", "copy", "a word that is gone when it is asked for, read in segments",
         lambda options: not options.get("start", True)),
    Kind("short", "short input", "text", "text that every mechanism sees whole", short=True),
)  # fmt: skip
WORDS: Mapping[str, tuple[str, ...]] = {
    **{kind.key: (kind.key,) for kind in KINDS},
    "recall": ("recall_within", "recall_beyond"),
}
"""What `task=` takes, and which columns that means."""


def kinds_of(word: str) -> list[Kind]:
    """The columns that a word means.

    Raises:
        ValueError: naming the word and those that there are.
    """
    if not isinstance(word, str) or word not in WORDS:
        raise ValueError(f"task must be one of {', '.join(sorted(WORDS))}, got {shown(word)}{near(str(word), WORDS)}")
    return [kind for kind in KINDS if kind.key in WORDS[word]]


def answers(task: Task, kind: Kind) -> bool:
    """Whether the rows of a task belong in a column."""
    rows = [row for each in task.learnt for row in (*each.rows, *each.failed)]
    if task.name != kind.task or not rows:
        return False
    options = (rows[0].get("config") or {}).get("task")
    if not kind.holds(options if isinstance(options, dict) else {}):
        return False
    return kind.short is None or kind.short == _sees_all([row for each in task.others for row in each.rows])


def _sees_all(rows: Sequence[Row]) -> bool:
    """Whether rows say that each of them saw every key of its whole length; none, where rows say nothing."""
    given = [row.get("given") or {} for row in rows]
    return bool(given) and all(
        each.get("length") and each.get("layer_reach") is not None and each["layer_reach"] >= each["length"] - 1
        and each.get("keys_mean") is not None and each["keys_mean"] >= (each["length"] + 1) / 2 - 1e-6
        for each in given
    )  # fmt: skip
