"""The main job: picture, measure and train every backend, then draw. What is finished is not done again.

The list of backends is the registry's, so that one file and one yaml (or a third party's entry point) bring a mechanism
into the comparison with no other edit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from attention_zoo.advice.matrix import Matrix
from attention_zoo.files import plain, write_atomic
from attention_zoo.jobs import rates
from attention_zoo.jobs.ahead import cells_ahead, in_words, planned_runs, trainings_ahead
from attention_zoo.jobs.comparison import CompareConfig, Steps, TrainingPlan, Variant
from attention_zoo.jobs.following import send_cells, send_report
from attention_zoo.jobs.plan import COMMAND, planned_cells, write_plan
from attention_zoo.jobs.progress import TrainingProgress
from attention_zoo.jobs.published import published_rows, published_tables
from attention_zoo.jobs.refused import refused
from attention_zoo.jobs.steps import Asked, equal_steps, known_steps
from attention_zoo.jobs.trainings import Run, run_trainings
from attention_zoo.locks import owning
from attention_zoo.measure.cells import SpeedCell, run_cells
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.kept import clear_leftovers, output_folder
from attention_zoo.measure.nursery import Nursery
from attention_zoo.measure.progress import CellProgress
from attention_zoo.report import units
from attention_zoo.report.build import build_report
from attention_zoo.report.patterns import unseen
from attention_zoo.report.rows import sift
from attention_zoo.report.summary import show, write_csv
from attention_zoo.results.row import Row
from attention_zoo.schemas import store

__all__ = ["CompareConfig", "TrainingPlan", "Variant", "ahead", "compare", "register", "write_results"]


def register() -> None:
    """Make the schema known to Hydra."""
    store("compare_schema", CompareConfig)


def compare(config: CompareConfig, console: Console | None = None) -> Path:
    """Run the whole comparison.

    Returns:
        the path of the report; results.jsonl and results.csv lie beside it.

    Raises:
        ValueError: for a wrong option, before anything runs, or if another process works in the folder. What goes wrong
            later is a row; what cannot be trained is named before anything is timed.
        OSError: if something cannot be written, naming it; what was written before is whole.
        KeyboardInterrupt: when asked to stop, after what there is was written.
    """
    console = console or Console()
    folder, began = output_folder(config.output), time.monotonic()
    config.measure.backends, config.measure.output = config.measured(), config.output
    config.measure.retry = config.retry or config.measure.retry
    cells = config.measure.cells()
    runs = [run for name, runs in config.planned().items() for run in _all_of(config, name, runs)]
    with owning(folder):
        clear_leftovers(folder)
        clear_leftovers(folder / "training")
        console.print(
            f"{len(config.names())} backends: {len(cells)} cells to measure, {len(runs)} trainings, in {folder}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        for name, why in refused(config.runs(), folder / "training").items():
            console.print(f"! {name}: {why}", soft_wrap=True, markup=False, highlight=False)
        job = _Job(config, folder, console)
        try:
            job.run(cells, job.equal_steps())
        except KeyboardInterrupt:
            # with less, what an earlier call wrote is better
            if any(row["kind"] not in ("portrait", "published") for row in job.rows):
                write_results(job.rows, folder, title=config.title)
            raise
        console.print("4/4 report", style="bold")
        if job.again:
            total = len(cells) + job.trainings
            console.print(f"{job.again} of {total} results were finished before and are drawn only")
        path = write_results(job.rows, folder, title=config.title)
        show(job.rows, path, console)
        if (ranking := Matrix.of(sift(job.rows)).ranking()) is not None:
            job.say(f"• {ranking}")
        if (tracker := config.followed()) is not None:
            send_report(job.rows, path, tracker, title=config.title, say=job.say)
        console.print(f"done in {units.seconds(time.monotonic() - began)}", highlight=False)
    return path


def ahead(config: CompareConfig) -> str:
    """What it would take, in one line.

    Raises:
        ValueError: as `compare`.
    """
    folder = output_folder(config.output)
    config.measure.backends, config.measure.output = config.measured(), config.output
    how, cells = config.measure.how(), config.measure.cells()
    plans = {name: _all_of(config, name, runs) for name, runs in config.planned(_known_steps(config, folder)).items()}
    retry = config.retry or config.measure.retry
    timed = {
        name: (config.trainings[name].seconds if config.trainings[name].timed else None, runs)
        for name, runs in plans.items()
    }
    with Nursery() as nursery:
        measured, first = cells_ahead(cells, folder, nursery, how["budget_s"], retry=retry, force=how["force"])
        trained, second, further = trainings_ahead(
            timed, folder / "training", nursery, parallel=config.parallel, retry=config.retry
        )
    return in_words([measured, trained], [first, second], further) + f"; {folder}"


def _all_of(config: CompareConfig, name: str, runs: list[Run]) -> list[Run]:
    """The trainings of a plan with those that choose rates; of later seeds the rate stands for the one to come."""
    tried = config.trainings[name].rates
    if not tried or not runs:
        return runs
    first = rates.tried(runs, tried)
    rest = rates.with_rates(runs, tried, dict.fromkeys((run.config["backend"] for run in runs), tried[0]))
    return list({run.name: run for run in [*rest, *first]}.values())


def _asked(config: CompareConfig) -> dict[str, Asked]:
    """What is asked of the plans whose steps are chosen from timed ones."""
    return {
        name: Asked(
            plan.seconds, _all_of(config, name, runs), own=plan.regime == "seconds", against=plan.against
        )
        for name, runs in config.planned().items()
        if (plan := config.trainings[name]).timed and plan.seconds is not None
    }  # fmt: skip


def _known_steps(config: CompareConfig, folder: Path) -> Steps:
    return known_steps(_asked(config), folder, parallel=config.parallel)


class _Job:
    """What is asked for, with the rows that there are so far."""

    def __init__(self, config: CompareConfig, folder: Path, console: Console):
        self.config, self.folder, self.console = config, folder, console
        self.rows: list[Row] = published_rows(published_tables(config.published, config.names()))
        self.again = 0
        self.trainings = 0

    def run(self, cells: list[SpeedCell], steps: Steps) -> None:
        """Measure, train and keep every row.

        Args:
            steps: of the plans whose number was chosen.
        """
        config, console = self.config, self.console
        plans = {name: _all_of(config, name, runs) for name, runs in config.planned(steps).items()}
        self._plan(cells, [run for runs in plans.values() for run in runs])
        console.print("1/4 what each token sees", style="bold")
        self._picture()
        console.print("2/4 time and memory", style="bold")
        before = list(self.rows)
        with CellProgress(console) as measuring:
            measured = run_cells(
                cells, self.folder, on_event=self._noting(measuring), on_bad=measuring.say, **config.measure.how()
            )
        self.rows = [*before, *measured]
        if (tracker := config.followed()) is not None:
            send_cells(measured, self.folder, tracker, say=measuring.say)
        console.print("3/4 training", style="bold")
        before = list(self.rows)
        best, skipped, chose = self._rates(steps)
        runs = config.runs(steps, best)
        self._plan(cells, [*chose, *(run for run in runs if run.name not in {each.name for each in chose})])
        with TrainingProgress(console) as training:
            trained = self._train(runs, training)
        self.rows = [*before, *trained]
        tried = len({run.name for run in chose} & {run.name for run in runs})
        self.again = measuring.kinds["skipped"] + training.skipped + skipped - tried
        self.trainings = len(runs) + len(chose) - tried

    def _train(self, runs: list[Run], training: TrainingProgress) -> list[Row]:
        return run_trainings(
            runs, self.folder / "training", parallel=self.config.parallel, retry=self.config.retry,
            on_event=self._noting(training), on_bad=training.say,
        )  # fmt: skip

    def _rates(self, steps: Steps) -> tuple[dict[str, dict[str, float]], int, list[Run]]:
        """The learning rate of each backend by plan, chosen among its plan's; how many of the trainings that this took
        were finished before, and all of these."""
        found: dict[str, dict[str, float]] = {}
        every, skipped, kept = list[Run](), 0, list(self.rows)
        for name, runs in self.config.planned(steps).items():
            plan = self.config.trainings[name]
            if not plan.rates or not runs:
                continue
            tried = rates.tried(runs, plan.rates)
            with TrainingProgress(self.console) as training:
                rows = self._train(tried, training)
            skipped += training.skipped
            every += tried
            self.rows = list(kept)  # those of the chosen rates come with their runs
            found[name] = rates.chosen(runs, plan.rates, {run.name: row for run, row in zip(tried, rows)})
            each = ", ".join(f"{backend} {rate:g}" for backend, rate in found[name].items())
            self.say(f"{name}: learning rates chosen on validation among {len(plan.rates)}: {each}")
        return found, skipped, every

    def _plan(self, cells: list[SpeedCell], runs: list[Run]) -> None:
        planned = [*planned_cells(cells, self.folder), *planned_runs(runs, self.folder)]
        write_plan(self.folder, COMMAND.get(), planned, parallel=self.config.parallel)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def equal_steps(self) -> Steps:
        """The steps of those plans that have seconds instead."""
        asked = _asked(self.config)
        if not asked:
            return {}

        def say(name: str, steps: int | Mapping[str, int], timed: Mapping[str, float]) -> None:
            each = ", ".join(f"{backend} {units.seconds(seconds)}" for backend, seconds in timed.items())
            many = f"{steps:,} steps each" if isinstance(steps, int) else "steps " + ", ".join(
                f"{backend} {count:,}" for backend, count in steps.items()
            )  # fmt: skip
            self.console.print(f"{name}: {many} (a step: {each})", soft_wrap=True, markup=False)

        self.console.print("0/4 steps that every backend can take", style="bold")
        return equal_steps(asked, self.folder, parallel=self.config.parallel, on_chosen=say)

    def _picture(self) -> None:
        """Each in a process of its own: a mechanism may end the one that it runs in."""
        with Nursery() as nursery:
            for name in self.config.measured():
                length = self.config.picture_length
                given = {"name": name, "options": self.config.small.get(name), "length": length}
                found = nursery.call(
                    "attention_zoo.report.patterns:portrait", given, timeout_s=self.config.measure.patience_s
                )
                self.rows.append(unseen(name, length, given, found) if isinstance(found, Ended) else found)

    def _noting(self, shown: Callable[[Any], None]) -> Callable[[Any], None]:
        """Show an event, and keep the row that came with it."""

        def note(event: Any) -> None:
            if event.kind in ("skipped", "finished") and event.row is not None:
                self.rows.append(event.row)
            shown(event)

        return note


def write_results(rows: list[Row], folder: str | Path, *, title: str) -> Path:
    """results.jsonl, results.csv and report.html of some rows; returns the path of the report."""
    folder = Path(folder)
    write_atomic(folder / "results.jsonl", "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))
    write_csv(rows, folder / "results.csv")
    return build_report(rows, folder / "report.html", title=title)
