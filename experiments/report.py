"""Draw a report from one or more results.jsonl, without running anything: `python -m experiments.report --help`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from attention_zoo.options import Text
from attention_zoo.report import build_report, read, write_csv
from attention_zoo.report.compare import show
from attention_zoo.settings import settings
from attention_zoo.training.launch import launch


@dataclass
class ReportConfig:
    """conf/report.yaml.

    Fields:
        results: JSONL files of rows.
        output: folder of report.html and results.csv; null is that of the first file.
        title: on top of the report.
    """

    results: list[Text] = field(default_factory=list)
    output: Text | None = None
    title: Text = ""


ConfigStore.instance().store(name="report_schema", node=ReportConfig)


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


@hydra.main(version_base="1.3", config_path="pkg://attention_zoo.conf", config_name="report")
def main(composed: DictConfig) -> None:
    try:
        report(settings(composed))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    launch(main)
