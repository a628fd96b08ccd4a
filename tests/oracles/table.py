"""The largest errors of all cases, as a Markdown table: `python -m tests.oracles.table`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import bigbird, longformer, reformer, torch_modules, transformer_xl
from .case import Case, Errors


def all_cases() -> Iterator[Case]:
    for module in (torch_modules, longformer, bigbird, reformer, transformer_xl):
        yield from module.cases()


def largest() -> dict[tuple[str, str], dict[torch.dtype, Errors]]:
    """By backend and oracle, in each dtype."""
    found: dict[tuple[str, str], dict[torch.dtype, Errors]] = {}
    for case in all_cases():
        row = found.setdefault((case.backend, case.oracle), {})
        for dtype in case.bounds:
            now, before = case.run(dtype), row.get(dtype, Errors(0.0, 0.0))
            row[dtype] = Errors(max(now.output, before.output), max(now.gradient, before.gradient))
    return found


def markdown() -> str:
    """Outputs: largest absolute error at unit scale. Gradients: largest relative norm over input and parameters."""
    lines = [
        "| backend | oracle | output, float32 | gradient, float32 | output, float64 | gradient, float64 |",
        "|---|---|---|---|---|---|",
    ]
    for (backend, oracle), row in largest().items():
        cells = [
            f"{value:.0e}" if dtype in row else "–"
            for dtype in (torch.float32, torch.float64)
            for value in row.get(dtype, Errors(0.0, 0.0))[:2]
        ]
        lines.append(f"| {backend} | {oracle} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(markdown())
