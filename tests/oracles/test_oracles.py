"""Every case of every oracle, in float32 and float64, within its bounds; and the table that is printed from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from .case import USUAL, Case
from .table import DTYPES, all_cases, rows

CASES = [
    pytest.param(case, dtype, id=f"{case.backend}-{case.oracle}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in all_cases()
    for dtype in case.bounds.errors
]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_equals_foreign_code(case: Case, dtype: torch.dtype) -> None:
    found, bound = case.run(dtype), case.bounds.errors[dtype]
    assert found.output <= bound.output
    assert found.gradient <= bound.gradient, f"in the gradient of {found.worst}"


def test_the_table_has_every_row_and_its_figures_are_within_their_bounds() -> None:
    """Figures differ in their last place from machine to machine; rows, counts, notes and bounds do not."""
    text = Path(__file__).with_name("README.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    expected = rows()
    assert [(cells[0], cells[1], int(cells[2])) for cells in table[2:]] == [
        (row.backend, row.oracle, len(row.cases)) for row in expected
    ], "write it anew: python -m tests.oracles.table > tests/oracles/README.md"
    for cells, row in zip(table[2:], expected):
        bounds = row.bounds
        assert bool(cells[7]) == bool(bounds.why) == (bounds != USUAL), "an unusual bound needs its reason"
        assert not bounds.why or notes[cells[7].strip("[]")].endswith(bounds.why)
        for dtype, figures in zip(DTYPES, (cells[3:5], cells[5:7])):
            if dtype not in bounds.errors:
                assert figures == ["–", "–"]
                continue
            assert max(map(float, figures)) > 0  # outputs alone may be equal to the last bit on one CPU
            for figure, allowed in zip(figures, bounds.errors[dtype][:2]):
                assert float(figure) <= 1.05 * allowed  # one digit is printed
