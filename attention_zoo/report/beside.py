"""What was learnt beside what it costs: which line of costs belongs to which trainings."""

from __future__ import annotations

from attention_zoo.report.costs import Series
from attention_zoo.report.quality import Learnt, Task


def pairs(task: Task, many: list[Series]) -> list[tuple[Learnt, Series]]:
    """What was learnt beside what it costs: of the same backend, and where there are several groups or lines of it,
    with the same options and from the same file. Who reads less than others has no cost here: it is that of its budget.
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
        found += [(learnt, series) for series in mine]
    return found
