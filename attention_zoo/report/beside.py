"""What was learnt beside what it costs: which line of costs belongs to which trainings."""

from __future__ import annotations

from attention_zoo.report import groups
from attention_zoo.report.costs import Series
from attention_zoo.report.learnt import Learnt
from attention_zoo.report.quality import Task


def trained_at(learnt: Learnt, series: Series) -> str | None:
    """The mechanism at the options that it was trained with, where those of the costs are others; else None. Options
    that were given and defaults that are the same are alike; of somebody else's, not installed here, nobody knows."""
    from attention_zoo.advice.lines import known, line_of  # reads rows by this package, as `build._advice` says

    if not learnt.rows or not known(learnt.rows[0]):
        return None
    trained, measured = line_of(learnt.rows[0]), line_of(next(iter(series.rows.values())))
    own = tuple(option for option in trained.options if option[0] != groups.COMPRESS)  # says what was read
    return None if own == measured.options else trained.label


def pairs(task: Task, many: list[Series]) -> list[tuple[Learnt, Series]]:
    """What was learnt beside what it costs: of the same backend, with the same options, and where there are several
    files from the same one. Who reads less than others has no cost here: it is that of its budget.
    """
    found = []
    whole = [each for each in task.learnt if each.rows and not each.reads_less]
    for learnt in whole:
        mine = [series for series in many if series.backend == learnt.backend]
        if len({series.place.get("file") for series in many}) > 1:
            mine = [series for series in mine if series.place.get("file") == dict(learnt.group.place).get("file")]
        options = {each.group.options for each in whole if each.backend == learnt.backend}
        if len(options | {series.group.options for series in mine}) > 2:
            # one set of options for trainings and one for costs may be the same in two ways of writing; more may not
            own = dict(learnt.group.options)
            mine = [s for s in mine if s.group.options and dict(s.group.options).items() <= own.items()]
        found += [(learnt, series) for series in mine if trained_at(learnt, series) is None]
    return found
