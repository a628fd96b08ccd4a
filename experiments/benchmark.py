"""Measure time and memory of every backend over lengths: `python -m experiments.benchmark --help`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from attention_zoo.files import write_atomic
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.cells import run_cells
from attention_zoo.measure.config import BASELINES, BenchmarkConfig, register
from attention_zoo.measure.derived import Efficiency, costs, efficiency_length, growth_exponent
from attention_zoo.measure.progress import CellProgress
from attention_zoo.report import units
from attention_zoo.report.summary import write_csv

register()
Row = dict[str, Any]


def benchmark(config: BenchmarkConfig, console: Console | None = None) -> list[Row]:
    """Run the grid, print its table, write results.jsonl and results.csv; returns the rows."""
    console = console or Console()
    cells = config.cells()
    with CellProgress(console) as progress:
        rows = run_cells(cells, config.output, on_event=progress, **config.how())
    folder = Path(config.output)
    write_atomic(folder / "results.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    write_csv(rows, folder / "results.csv")
    for phase in config.phases:
        console.print(
            table(f"{phase}, {config.variant}", [pair for pair in zip(cells, rows) if pair[0].phase == phase])
        )
    skipped = progress.kinds["skipped"]
    if skipped:
        console.print(f"{skipped} of {len(cells)} cells were finished already; force=true measures them again")
    console.print(f"wrote {folder / 'results.jsonl'} and {folder / 'results.csv'}", highlight=False)
    return rows


def table(title: str, measured: Iterable[tuple[SpeedCell, Row]]) -> Table:
    """Two lines for each backend and kernel, time and memory; lengths, growth and where each baseline is overtaken."""
    lines: dict[str, dict[int, Row]] = {}
    for cell, row in measured:
        name = cell.backend if cell.kernel == "auto" else f"{cell.backend}/{cell.kernel}"
        lines.setdefault(name, {})[cell.length] = row
    lengths = sorted({length for line in lines.values() for length in line})
    rivals = [name for name in BASELINES if name in lines]
    caption = "seconds: median; memory: peak of tensors; grows: exponent of length; beats: from which length on"
    shown = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=0
    )
    shown.add_column("backend", no_wrap=True)
    for heading in (*map(str, lengths), "grows", *(f"beats\n{name.partition('/')[2]}" for name in rivals)):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, line in lines.items():
        for quantity, unit in (("seconds", units.seconds), ("peak_bytes", units.size)):
            mine = costs(line.values(), quantity)
            growth = growth_exponent(mine)
            passes = [efficiency_length(mine, costs(lines[rival].values(), quantity)) for rival in rivals]
            shown.add_row(
                name if quantity == "seconds" else "",
                *(_brief(line.get(length), quantity, unit) for length in lengths),
                "–" if growth is None else f"{growth:.2f}",
                *(_where(each) if each and rival != name else "–" for rival, each in zip(rivals, passes)),
            )
    return shown


def _where(found: Efficiency) -> str:
    return str(found).replace("not up to", ">")


def _brief(row: Row | None, quantity: str, unit: Callable[[float], str]) -> str:
    if row is None:
        return "–"
    return unit(row[quantity]) if row["status"] == "ok" else row["status"]


@hydra.main(version_base="1.3", config_path="pkg://attention_zoo.conf", config_name="benchmark")
def main(composed: DictConfig) -> None:
    try:
        config: BenchmarkConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
        benchmark(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
