"""Draw again from rows, without running anything: what the command `report` does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console

from attention_zoo.options import Text, check_fields
from attention_zoo.report import build_report, read, write_csv
from attention_zoo.report.contexts import contexts
from attention_zoo.report.extract import write_tables
from attention_zoo.report.inspected import inspected
from attention_zoo.report.serve import HOST, Watched, server
from attention_zoo.report.summary import Findings, show
from attention_zoo.rules import shown
from attention_zoo.schemas import store

DEFAULT = "runs/compare/default/results.jsonl"
PORT = 8765


@dataclass
class ReportConfig:
    """conf/report.yaml.

    Fields:
        runs: a folder or a list of folders: sweeps, comparisons and benchmarks, side by side.
        results: a path or a list of paths beside them: JSONL files, a run's result.json, or folders. Where neither is
            given, the rows of the main job.
        output: folder of report.html, results.csv and tables/; null is beside the first.
        title: on top of the report.
        serve: instead of writing files, serve the page on this machine and go on watching.
        port: of the server; 0 takes a free one.
    """

    runs: Any = None
    results: Any = None
    output: Text | None = None
    title: Text = ""
    serve: bool = False
    port: Annotated[int, Field(ge=0, le=65535)] = PORT


def register() -> None:
    """Make the schema known to Hydra, which conf/report.yaml names first."""
    store("report_schema", ReportConfig)


def report(config: ReportConfig) -> Path | None:
    """Draw; returns the path of the report, or serves until it is asked to stop.

    Raises:
        ValueError: for a path with nothing behind it, or no row that can be drawn.
        OSError: naming the file that could not be written, or the port that is taken.
    """
    check_fields(ReportConfig, config)
    paths = [*_folders(config.runs), *_listed(config.results)]
    if config.runs is None and config.results is None:
        paths = [DEFAULT]
    if config.serve:
        _serve(Watched([str(path) for path in paths], config.title), config.port, Console())
        return None
    rows, seen, measured = read(paths), inspected(paths), contexts(paths)
    rows.left_out += seen.left_out + measured.left_out
    first = Path(paths[0])
    beside = first if first.is_dir() else first.parent
    folder = beside if config.output is None else Path(config.output)
    path = build_report(
        rows, folder / "report.html", title=config.title, attention=seen.inspections, contexts=measured.groups
    )
    write_csv(rows, folder / "results.csv")
    write_tables(Findings.of(rows), folder / "tables")
    show(rows, path, Console())
    return path


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)


def _folders(runs: Any) -> list[Any]:
    found = _listed(runs)
    for each in found:
        if not isinstance(each, str) or not Path(each).is_dir():
            raise ValueError(f"runs must be a folder or a list of folders, got {shown(each, 60)}; results= takes files")
    return found


def _serve(watched: Watched, port: int, console: Console) -> None:
    with server(watched, port) as serving:
        where = f"http://{HOST}:{serving.server_address[1]}/"
        console.print(f"watching {', '.join(map(str, watched.paths))}: {where} (Ctrl-C ends it)", markup=False)
        serving.serve_forever(poll_interval=0.2)
