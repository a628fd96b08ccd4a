"""By what trainings ended: after all of their steps, or before, by an option of the trainer that looks at a set."""

from __future__ import annotations

from attention_zoo.report.metrics import RESULT
from attention_zoo.results.row import Row

EARLY = ("time", "stop_at", "patience")
"""What ends a run before its last step."""


def ended(row: Row, by: str) -> bool:
    """Whether a run ended before its last step by this, one of `EARLY`."""
    return str(row.get("stopped") or "").startswith(by)


def by_its_judge(row: Row) -> bool:
    """Whether a run ended at its best on the set of its result, which then flatters it; validation is for that."""
    return ended(row, "patience") and RESULT not in (row.get("evaluations") or {})
