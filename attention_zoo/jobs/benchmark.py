"""A benchmark: cells, or matches with peers, or lengths within a budget; tables for the terminal and files beside.

Everything measured lies in the output folder by its identity, and the page is drawn from all of it, so that several
calls fill one page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from attention_zoo.files import plain, write_atomic
from attention_zoo.jobs.ahead import cells_ahead, in_words
from attention_zoo.jobs.following import followed, send_cells, send_report
from attention_zoo.jobs.plan import COMMAND, Planned, planned_cells, write_plan
from attention_zoo.locks import owning
from attention_zoo.measure.budget import longest_trainable, parse_bytes
from attention_zoo.measure.cell import SpeedCell
from attention_zoo.measure.cells import CellEvent, read_cells, run_cells
from attention_zoo.measure.config import BenchmarkConfig
from attention_zoo.measure.kept import clear_leftovers, keep_row, output_folder, read_rows
from attention_zoo.measure.nursery import Nursery
from attention_zoo.measure.peers.contest import row_id, run_contest
from attention_zoo.measure.peers.matches import Match, heats
from attention_zoo.measure.progress import CellProgress, named
from attention_zoo.report import rivals, units
from attention_zoo.report.build import build_report
from attention_zoo.report.summary import write_csv
from attention_zoo.report.tables import cost_table, figures_page, terminal_table
from attention_zoo.results.row import Row

TITLE = "What attention costs"
WIDE = ("resident ratio", "ours peaks", "theirs peaks")
"""Columns that only the page has room for."""


def benchmark(config: BenchmarkConfig, console: Console | None = None) -> list[Row]:
    """Run it, print its tables and write its files; returns the rows of this call.

    Writes results.jsonl and results.csv (the rows of this call), and report.html and figures.md (all in the folder).

    Raises:
        ValueError: for a wrong option, before anything runs, or if another process works in the folder.
        OSError: if something cannot be written, naming it; what was written before is whole.
        KeyboardInterrupt: when asked to stop, after what there is was written.
    """
    console = console or Console()
    job = _Job(config, console)
    with owning(job.folder):
        clear_leftovers(job.folder)
        try:
            job.run()
        except KeyboardInterrupt:
            if job.rows:  # else what an earlier call wrote is better than nothing
                job.write()
            raise
        job.write()
        job.follow()
        job.say(f"wrote results.jsonl, results.csv, report.html and figures.md in {job.folder}")
    return job.rows


def ahead(config: BenchmarkConfig) -> str:
    """What it would take, in one line.

    Raises:
        ValueError: as `benchmark`.
    """
    job = _Job(config, Console(quiet=True))
    if config.peers:
        return in_words([f"{len(job.matches)} matches"], [None]) + f"; {job.folder}"
    how = config.how()
    with Nursery() as nursery:
        said, seconds = cells_ahead(
            job.cells, job.folder, nursery, budget_s=how["budget_s"], retry=how["retry"], force=how["force"]
        )
    return in_words([said], [seconds]) + f"; {job.folder}"


def _planned_matches(matches: Iterable[Match], folder: Path, rounds: int) -> list[Planned]:
    """Matches with peers, shortest first, as `measure.peers.contest.run_contest` has them met."""
    found = []
    for heat in heats(matches):
        for match, peer in [(each, peer) for each in heat for peer in each.rivals]:
            name = row_id(match.cell, peer, rounds)
            place = folder.absolute() / "peers" / f"{name}.json"
            found.append(Planned(f"{named(match.cell)} against {peer}", "match", str(place), id=name))
    return list(dict.fromkeys(found))


class _Job:
    """What is asked for, refused at once where it cannot be meant, with the rows that there are so far."""

    def __init__(self, config: BenchmarkConfig, console: Console):
        self.config, self.console = config, console
        self.folder = output_folder(config.output)
        self.tracker = followed(config.tracker, self.folder)
        self.rows: list[Row] = []
        self._told: set[str] = set()
        self.matches = config.matches() if config.peers else []
        self.cells = [] if config.peers else config.cells()
        if not self.cells and not config.peers:
            given = ", ".join(f"{key}={getattr(config, key)}" for key in ("backends", "lengths", "phases"))
            limit = f" and quadratic_up_to={config.quadratic_up_to}" if config.lengths and config.phases else ""
            raise ValueError(f"backends, lengths and phases must leave a cell to measure, got {given}{limit}")
        self.budget = None if config.peers or config.budget is None else parse_bytes(config.budget)
        if self.budget is not None and not {"forward_backward", "train_step"} & set(config.phases):
            raise ValueError(f"phases must hold forward_backward or train_step with a budget, got {config.phases}")

    def run(self) -> None:
        if self.config.peers:
            self._contest()
            return
        self._measure()
        if self.budget is not None:
            self._budgets(self.budget)

    def write(self) -> None:
        lines = [json.dumps(plain(row), allow_nan=False) + "\n" for row in self.rows]
        write_atomic(self.folder / "results.jsonl", "".join(lines))
        write_csv(self.rows, self.folder / "results.csv")
        everything = [
            *read_cells(self.folder, self._bad),
            *read_rows(self.folder / "peers", "peer", self._bad),
            *read_rows(self.folder / "budgets", "budget", self._bad),
        ]
        build_report(everything, self.folder / "report.html", title=TITLE)
        write_atomic(self.folder / "figures.md", figures_page(everything))

    def follow(self) -> None:
        """Tell a tracker of the cells and the report."""
        if self.tracker is not None:
            send_cells(self.rows, self.folder, self.tracker, say=self.say)
            send_report(self.rows, self.folder / "report.html", self.tracker, title=TITLE, say=self.say)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _bad(self, line: str) -> None:
        """A file that cannot be read, told once."""
        if line not in self._told:
            self._told.add(line)
            self.say(line)

    def _measure(self) -> None:
        config, cells = self.config, self.cells
        write_plan(self.folder, COMMAND.get(), planned_cells(cells, self.folder))
        with CellProgress(self.console) as progress:

            def note(event: CellEvent) -> None:
                if event.kind in ("skipped", "finished") and event.row is not None:
                    self.rows.append(event.row)
                progress(event)

            self.rows = run_cells(cells, self.folder, on_event=note, on_bad=self._bad, **config.how())
        for phase in config.phases:
            shown = [pair for pair in zip(cells, self.rows) if pair[0].phase == phase]
            self.console.print(cost_table(f"{phase}, {config.variant}", shown))
        skipped = progress.kinds["skipped"]
        if skipped:
            self.console.print(f"{skipped} of {len(cells)} cells were finished already; force=true measures them again")

    def _contest(self) -> None:
        def keep(rows: Sequence[Row]) -> None:
            for row in rows:
                keep_row(self.folder / "peers" / f"{row['id']}.json", row)
            self.rows += rows

        config, how = self.config, self.config.how()
        write_plan(self.folder, COMMAND.get(), _planned_matches(self.matches, self.folder, config.rounds))
        run_contest(
            self.matches, rounds=config.rounds, pythons=config.peer_python, say=self.say, on_rows=keep,
            timeout_s=how["timeout_s"], memory_limit_bytes=how["memory_limit_bytes"],
        )  # fmt: skip
        self.console.print(
            terminal_table("ours and theirs in turns: theirs over ours", rivals.peers_table(self.rows), WIDE),
            width=_width(self.console),
        )

    def _budgets(self, budget: int) -> None:
        """The longest trainable length of every series among the cells that trains."""
        config, found = self.config, []
        series: dict[Any, list[tuple[SpeedCell, Row]]] = {}
        for cell, row in zip(self.cells, self.rows):
            if cell.phase in ("forward_backward", "train_step"):
                series.setdefault(cell.series(), []).append((cell, row))
        with Nursery() as nursery:

            def attempt(cell: SpeedCell) -> Row:
                return nursery.run(
                    cell, timeout_s=config.patience_s, memory_limit_bytes=budget, repeats=1, budget_s=0.0, observe=False
                )

            for many in series.values():
                row = longest_trainable(
                    many[0][0], [row for _, row in many], budget, attempt, timeout_s=config.patience_s,
                    say=lambda line: self.say(f"within {units.size(budget)}: {line}"),
                )  # fmt: skip
                keep_row(self.folder / "budgets" / f"{row['id']}.json", row)
                self.rows.append(row)
                found.append(row)
        self.console.print(
            terminal_table(f"longest trainable length within {units.size(budget)}", rivals.budgets_table(found)),
            width=_width(self.console),
        )


def _width(console: Console) -> int | None:
    """A file is as wide as it must be."""
    return None if console.is_terminal else 160
