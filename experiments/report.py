"""Draw a report from results that are there, without running anything: `python -m experiments.report --help`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from attention_zoo.report import build_report, read, write_csv
from attention_zoo.report.compare import show
from attention_zoo.training.launch import launch


@dataclass
class ReportConfig:
    """conf/report.yaml.

    Fields:
        results: a path or a list of paths: JSONL files, a run's result.json, or folders of runs and benchmarks.
        output: folder of report.html and results.csv; null is beside the first.
        title: on top of the report.
    """

    results: Any = field(default_factory=list)
    output: str | None = None
    title: str = ""


ConfigStore.instance().store(name="report_schema", node=ReportConfig)


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


@hydra.main(version_base="1.3", config_path="pkg://attention_zoo.conf", config_name="report")
def main(composed: DictConfig) -> None:
    try:
        report(OmegaConf.to_object(composed))  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    launch(main)
