"""Draw again from rows, without running anything: what the command `report` does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from attention_zoo.options import Text
from attention_zoo.report import build_report, read, write_csv
from attention_zoo.report.summary import show
from attention_zoo.schemas import store


@dataclass
class ReportConfig:
    """conf/report.yaml.

    Fields:
        results: a path or a list of paths: JSONL files, a run's result.json, or folders of runs and benchmarks.
        output: folder of report.html and results.csv; null is beside the first.
        title: on top of the report.
    """

    results: Any = field(default_factory=list)
    output: Text | None = None
    title: Text = ""


def register() -> None:
    """Make the schema known to Hydra, which conf/report.yaml names first."""
    store("report_schema", ReportConfig)


def report(config: ReportConfig) -> Path:
    """Draw; returns the path of the report.

    Raises:
        ValueError: for a path with nothing behind it, or no row that can be drawn.
        OSError: naming the file that could not be written.
    """
    rows = read(config.results)
    first = Path(config.results if isinstance(config.results, str) else config.results[0])
    beside = first if first.is_dir() else first.parent
    folder = beside if config.output is None else Path(config.output)
    path = build_report(rows, folder / "report.html", title=config.title)
    write_csv(rows, folder / "results.csv")
    show(rows, path, Console())
    return path
