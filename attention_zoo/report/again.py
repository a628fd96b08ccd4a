"""Draw again from rows, without running anything: what the command `report` does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from attention_zoo.report import build_report, read, write_csv
from attention_zoo.report.compare import show
from attention_zoo.schemas import store


@dataclass
class ReportConfig:
    """conf/report.yaml.

    Fields:
        results: JSONL files of rows; of a result that occurs twice the last counts.
        output: folder of report.html and results.csv; null is that of the first file.
        title: on top of the report.
    """

    results: list[str] = field(default_factory=list)
    output: str | None = None
    title: str = ""


def register() -> None:
    """Make the schema known to Hydra, which conf/report.yaml names first."""
    store("report_schema", ReportConfig)


def report(config: ReportConfig) -> Path:
    """Draw; returns the path of the report.

    Raises:
        ValueError: for no file, or one that is missing or holds no rows.
    """
    if not config.results:
        raise ValueError("results must name at least one JSONL file, got none")
    rows = read(config.results)
    folder = Path(config.results[0]).parent if config.output is None else Path(config.output)
    path = build_report(rows, folder / "report.html", title=config.title)
    write_csv(rows, folder / "results.csv")
    show(rows, path, Console())
    return path
