"""A table in words, ready to be shown on a page, in a terminal or in a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Table:
    """Headers and cells.

    Fields:
        notes: what marks in the cells mean.
    """

    headers: list[str]
    cells: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def marked(self, notes: Iterable[str]) -> Table:
        return Table(self.headers, self.cells, [*self.notes, *notes])
