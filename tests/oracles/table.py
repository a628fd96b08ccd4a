"""The largest errors of all cases, as Markdown: `python -m tests.oracles.table > tests/oracles/README.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import (
    bigbird,
    compressive,
    longformer,
    memory_compressed,
    reformer,
    reversible,
    torch_modules,
    transformer_xl,
    transformer_xl_formulas,
    transformer_xl_recorded,
)
from .case import USUAL, Bounds, Case, Errors

MODULES = (
    torch_modules,
    reversible,
    longformer,
    bigbird,
    reformer,
    memory_compressed,
    transformer_xl,
    transformer_xl_formulas,
    transformer_xl_recorded,
    compressive,
)
DTYPES = (torch.float32, torch.float64)
HEAD = """\
# Against code that is not ours

Every mechanism and the skeleton, on random weights, lengths, padding and global tokens, against foreign code that runs
on the same weights: outputs, and the gradients of the input and of every parameter. The largest errors of each row's
cases; `python -m tests.oracles.table` writes this file, and the tests hold every case to its bounds.

Output: largest difference at a valid token, absolute at unit scale (relative where the output is above 1). Gradient:
‖ours − theirs‖ / ‖theirs‖, the largest over the input and all modules.
Bounds: {usual}, unless a note says otherwise.
"""


class Row(NamedTuple):
    """All cases of one backend against one oracle."""

    backend: str
    oracle: str
    cases: list[Case]

    @property
    def bounds(self) -> Bounds:
        return self.cases[0].bounds

    def largest(self, dtype: torch.dtype) -> Errors:
        found = [case.run(dtype) for case in self.cases]
        return Errors(max(one.output for one in found), max(one.gradient for one in found))


def all_cases() -> Iterator[Case]:
    for module in MODULES:
        yield from module.cases()


def rows() -> list[Row]:
    """In the order of the table."""
    found: dict[tuple[str, str], Row] = {}
    for case in all_cases():
        row = found.setdefault((case.backend, case.oracle), Row(case.backend, case.oracle, []))
        row.cases.append(case)
        assert case.bounds == row.bounds, f"one row, one bound: {case}"
    return list(found.values())


def say(bounds: Bounds) -> str:
    """`bounds` in words."""
    return ", ".join(
        f"{error.output:.0e} and {error.gradient:.0e} in {str(dtype).removeprefix('torch.')}"
        for dtype, error in bounds.errors.items()
    )


def line(row: Row, notes: list[Bounds], cells: list[str]) -> str:
    """One row of the table; `cells` hold its figures."""
    note = f"[{notes.index(row.bounds) + 1}]" if row.bounds != USUAL else ""
    return f"| {row.backend} | {row.oracle} | {len(row.cases)} | {' | '.join(cells)} | {note} |"


def markdown() -> str:
    table = rows()
    notes = [row.bounds for row in table if row.bounds != USUAL]
    notes = [bounds for index, bounds in enumerate(notes) if bounds not in notes[:index]]
    lines = [
        HEAD.format(usual=say(USUAL)),
        "| backend | oracle | cases | output, float32 | gradient | output, float64 | gradient | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        found = {dtype: row.largest(dtype) for dtype in row.bounds.errors}
        cells = [f"{value:.0e}" if d in found else "–" for d in DTYPES for value in found.get(d, Errors(0, 0))[:2]]
        lines.append(line(row, notes, cells))
    lines += ["", *(f"{number}. {say(b)}. {b.why}" for number, b in enumerate(notes, 1))]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(markdown())
