"""The matrix as a section of the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attention_zoo.advice.matrix import Matrix
from attention_zoo.report import page
from attention_zoo.report.costs import Setting
from attention_zoo.results.row import Row

NOTE = (
    "Each cell is the difference from full attention on the same answers, with its 95 % interval over seeds, and what "
    "the tests say: better, worse, as good, or not told apart; or that it is not known, and why. Recall is told within "
    "and beyond what every query of one layer surely sees. Costs are of the options of their line, or say of which; "
    "≈ was not measured at this length, but follows from the line's own rows."
)


def section(rows: Iterable[Row], setting: Setting | None, length: int | None) -> str:
    """HTML; empty where nothing was trained that answers a column.

    Args:
        setting: of the costs; None where there are none.
        length: tokens at which costs are told.
    """
    at: dict[str, Any] = (
        {} if setting is None else {"device": setting.device, "phase": setting.phase, "variant": setting.variant}
    )
    found = Matrix.of(rows, None if setting is None else length, **at)
    if not found.cells:
        return ""
    ranking = found.ranking()
    said = page.warning("", [ranking]) if ranking else ""
    setting_words = "" if setting is None or length is None else f" Costs: {setting.words()}."
    return (
        said
        + page.table(found.table(), "text")
        + page.bullets(found.bars(), "note")
        + page.paragraph(NOTE + setting_words, "note")
    )
