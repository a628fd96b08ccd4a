"""The main job: picture, measure and train every backend, then draw. What is finished is not done again.

The list of backends is the registry's, so that one file and one yaml (or a third party's entry point) bring a mechanism
into the comparison with no other edit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from rich.console import Console

from attention_zoo import registry
from attention_zoo.files import plain, write_atomic
from attention_zoo.jobs.ahead import cells_ahead, in_words, planned_runs, trainings_ahead
from attention_zoo.jobs.following import followed, send_cells, send_report
from attention_zoo.jobs.plan import COMMAND, planned_cells, write_plan
from attention_zoo.jobs.progress import TrainingProgress
from attention_zoo.jobs.published import published_rows, published_tables
from attention_zoo.jobs.refused import refused
from attention_zoo.jobs.steps import equal_steps
from attention_zoo.jobs.trainings import Run, run_trainings
from attention_zoo.locks import owning
from attention_zoo.measure.cells import SpeedCell, run_cells
from attention_zoo.measure.config import BenchmarkConfig, check_mappings
from attention_zoo.measure.ends import Ended
from attention_zoo.measure.kept import clear_leftovers, output_folder
from attention_zoo.measure.nursery import Nursery
from attention_zoo.measure.progress import CellProgress
from attention_zoo.options import SeedOfRun, Text, check_fields
from attention_zoo.report import units
from attention_zoo.report.build import TITLE, build_report
from attention_zoo.report.patterns import unseen
from attention_zoo.report.summary import show, write_csv
from attention_zoo.results.row import Row
from attention_zoo.rules import OneOf, shown
from attention_zoo.schemas import store
from attention_zoo.settings import one_line
from attention_zoo.training.config import check, compose_training
from attention_zoo.training.heard import check_heard, keys_of

Made = TypeVar("Made")


@dataclass
class TrainingPlan:
    """One task on which every backend is trained.

    Fields:
        task: which of conf/task.
        model: which of conf/model.
        tracker: which of conf/tracker; null: that of the comparison.
        set: values of conf/train.yaml that differ, nested as there: {steps: 200, trainer: {max_seconds: 60}}.
        options: backend -> its own options; a backend without an entry keeps its defaults.
        seconds: how long all of its trainings may take together: every backend is then trained for the same number of
            steps, chosen from a few timed steps of each (`jobs.steps`). null: as many steps as `set` or the task says.
    """

    task: Text = "text"
    model: Text = "tiny"
    tracker: Text | None = None
    set: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a positive number or null")] | None = None


@dataclass
class Variant:
    """A backend under a name of its own, with options, or in a model, that are not its defaults. It is trained beside
    the others; layers are measured of backends alone.

    Fields:
        backend: which.
        options: its own options, over those that a plan gives it.
        set: values of conf/train.yaml that differ, as in `TrainingPlan`: {model: {shorten: "1@1 2@4 1@1"}}.
    """

    backend: Text
    options: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class CompareConfig:
    """conf/compare.yaml.

    Fields:
        backends: names of backends, or of `variants`; null takes every registered one.
        variants: name -> a backend that is trained under that name with options of its own.
        measure: the cells, as conf/benchmark.yaml; its backends and output are those of the comparison.
        trainings: name -> what to train on.
        seeds: each training is run with each; seven allow verdicts on four mechanisms beside full attention.
        parallel: trainings at a time.
        retry: failed: do again what failed, ran out of memory or timed out; null keeps such rows. What was ended from
            outside is always done again.
        dry: say how many cells and trainings there are and what they will take, and run nothing.
        published: name -> a published table that the trainings stand beside; see `published_tables`.
        small: backend -> options at which a few dozen tokens show its pattern, for the pictures; default the class's.
        picture_length: tokens of the pictures.
        title: on top of the report.
        tracker: which of conf/tracker hears of every training, of the cells once they are measured, and of the report;
            null: none.
        output: folder of everything.
    """

    backends: list[Text] | None = None
    variants: dict[str, Any] = field(default_factory=dict)  # Variant
    measure: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    trainings: dict[str, Any] = field(default_factory=dict)  # TrainingPlan; untyped, so that a word may add one
    seeds: list[SeedOfRun] = field(default_factory=lambda: [0])
    parallel: Annotated[int, Field(ge=1, le=1024)] = 2
    retry: Annotated[str, OneOf("failed")] | None = None
    dry: bool = False
    published: dict[str, Any] = field(default_factory=dict)  # PublishedTable
    small: dict[str, Any] = field(default_factory=dict)
    picture_length: Annotated[int, Field(ge=1, le=4096)] = 96
    title: Text = TITLE
    tracker: Any = None
    output: Text = "runs/compare"

    def __post_init__(self) -> None:
        self.trainings = {
            str(name): _plan(TrainingPlan, f"trainings.{name}", plan, "{task: text, model: tiny}")
            for name, plan in self.trainings.items()
        }
        self.variants = {
            str(name): _plan(Variant, f"variants.{name}", given, "{backend: longformer, options: {window: 64}}")
            for name, given in self.variants.items()
        }

    def names(self) -> list[str]:
        """The backends and variants, each known.

        Raises:
            ValueError: for an unknown one, listing those that there are; or a variant that is called as a backend is.
        """
        for name, variant in self.variants.items():
            registry.recipe(variant.backend, option=f"variants.{name}.backend")
            if name in (*registry.available(), *registry.wrappers()):
                raise ValueError(f"variants must have names of their own, got {name}, which is a backend's")
        given = list(registry.available()) if self.backends is None else list(self.backends)
        for name in given:
            if name not in self.variants:
                registry.recipe(name, option="backends")
        return given

    def followed(self) -> dict[str, Any] | None:
        """The tracker, if anything is followed; a ValueError for one that cannot be."""
        return followed(self.tracker, Path(self.output))

    def measured(self) -> list[str]:
        """Those of `names` that are backends."""
        return [name for name in self.names() if name not in self.variants]

    def runs(self, steps: Mapping[str, int] | None = None) -> list[Run]:
        """Every training, one backend after the other within a task, so that a task is complete early.

        Args:
            steps: of the plans whose number was chosen, by name.

        Raises:
            ValueError: for a wrong override or option, naming it.
        """
        return [run for runs in self.planned(steps).values() for run in runs]

    def planned(self, steps: Mapping[str, int] | None = None) -> dict[str, list[Run]]:
        """The same by plan."""
        check_fields(CompareConfig, self)
        published_tables(self.published, self.names())
        found: dict[str, list[Run]] = {}
        _check_options("small", self.small, self.variants)
        for task, plan in self.trainings.items():
            _check_options(f"trainings.{task}.options", plan.options, self.variants)
            shared = _shared(task, plan)
            if plan.tracker is None and (tracker := self.followed()) is not None:
                shared["tracker"] = tracker
            if plan.seconds is not None and "steps" in plan.set:
                raise ValueError(
                    f"trainings.{task}.seconds chooses the number of steps, got set.steps={plan.set['steps']} as well"
                )
            if steps and task in steps:
                shared["steps"] = steps[task]
            found[task] = []
            for seed in self.seeds:
                for name in self.names():
                    variant = self.variants.get(name) or Variant(name)
                    given = [plan.options.get(each) or {} for each in dict.fromkeys((variant.backend, name))]
                    options = [registry.recipe(variant.backend)[1], given[0], variant.options, *given[1:]]
                    config = {
                        **_with(shared, variant.set, f"variants.{name}"),
                        "seed": seed,
                        "backend": name,
                        "attention": _built(variant.backend, {k: v for each in options for k, v in each.items()}),
                    }
                    check_heard(config, ["attention", *keys_of(plan.set), *keys_of(variant.set)])
                    found[task].append(Run(f"{task}-{name}-s{seed}", check(config)))
        return found


def _plan(kind: type[Made], name: str, given: Any, example: str) -> Made:
    """A plan or variant from a mapping; a key that it does not know is refused."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping such as {example}, got {shown(given)}")
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(f"{name}: {one_line(error) or error}") from None
    return cast(Made, made)


def _shared(name: str, plan: TrainingPlan) -> dict[str, Any]:
    """What the trainings of a plan have in common; a key that conf/train.yaml does not know is refused."""
    chosen = [f"task={plan.task}", f"model={plan.model}", f"tracker={plan.tracker or 'none'}", "trainer.progress=none"]
    return _with(compose_training(chosen), plan.set, f"trainings.{name}")


def _with(base: Mapping[str, Any], values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A training's config with some values that differ."""
    known = OmegaConf.create(dict(base))
    OmegaConf.set_struct(known, True)
    OmegaConf.set_struct(known.evaluate_at, False)  # whose keys are names
    try:
        merged = OmegaConf.merge(known, values)
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}.set: {one_line(error)}") from None
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def _check_options(key: str, options: Mapping[str, Any], variants: Mapping[str, Any]) -> None:
    """Refuse options of no backend, and what cannot be options; a backend that takes no part may have some."""
    for name in options:
        if name not in variants:
            registry.recipe(name, option=f"a key of {key}")
    check_mappings(key, options)


def _built(name: str, options: dict[str, Any]) -> dict[str, Any]:
    # Through the registry rather than conf/attention, which third-party backends have no place in.
    for option in options:
        if option not in registry.options_of(name):
            raise ValueError(f"options of {name} must be among {', '.join(registry.options_of(name))}, got {option!r}")
    return {"name": name, **options}


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
    cells, runs = config.measure.cells(), config.runs()
    with owning(folder):
        clear_leftovers(folder)
        clear_leftovers(folder / "training")
        console.print(
            f"{len(config.names())} backends: {len(cells)} cells to measure, {len(runs)} trainings, in {folder}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        for name, why in refused(runs, folder / "training").items():
            console.print(f"! {name}: {why}", soft_wrap=True, markup=False, highlight=False)
        job = _Job(config, folder, console)
        try:
            job.run(cells, config.runs(job.equal_steps()))
        except KeyboardInterrupt:
            if any(
                row["kind"] not in ("portrait", "published") for row in job.rows
            ):  # else what an earlier call wrote is better
                write_results(job.rows, folder, title=config.title)
            raise
        console.print("4/4 report", style="bold")
        if job.again:
            total = len(cells) + len(runs)
            console.print(f"{job.again} of {total} results were finished before and are drawn only")
        path = write_results(job.rows, folder, title=config.title)
        show(job.rows, path, console)
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
    how, cells, plans = config.measure.how(), config.measure.cells(), config.planned()
    retry = config.retry or config.measure.retry
    timed = {name: (config.trainings[name].seconds, runs) for name, runs in plans.items()}
    with Nursery() as nursery:
        measured, first = cells_ahead(cells, folder, nursery, how["budget_s"], retry=retry, force=how["force"])
        trained, second, further = trainings_ahead(
            timed, folder / "training", nursery, parallel=config.parallel, retry=config.retry
        )
    return in_words([measured, trained], [first, second], further) + f"; {folder}"


class _Job:
    """What is asked for, with the rows that there are so far."""

    def __init__(self, config: CompareConfig, folder: Path, console: Console):
        self.config, self.folder, self.console = config, folder, console
        self.rows: list[Row] = published_rows(published_tables(config.published, config.names()))
        self.again = 0

    def run(self, cells: list[SpeedCell], runs: list[Run]) -> None:
        config, console = self.config, self.console
        planned = [*planned_cells(cells, self.folder), *planned_runs(runs, self.folder)]
        write_plan(self.folder, COMMAND.get(), planned, parallel=config.parallel)
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
        with TrainingProgress(console) as training:
            trained = run_trainings(
                runs, self.folder / "training", parallel=config.parallel, retry=config.retry,
                on_event=self._noting(training), on_bad=training.say,
            )  # fmt: skip
        self.rows = [*before, *trained]
        self.again = measuring.kinds["skipped"] + training.skipped

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def equal_steps(self) -> dict[str, int]:
        """The steps of those plans that have seconds instead."""
        plans = {
            name: (seconds, [run.config for run in runs])
            for name, runs in self.config.planned().items()
            if (seconds := self.config.trainings[name].seconds) is not None
        }
        if not plans:
            return {}

        def say(name: str, steps: int, timed: Mapping[str, float]) -> None:
            each = ", ".join(f"{backend} {units.seconds(seconds)}" for backend, seconds in timed.items())
            self.console.print(f"{name}: {steps:,} steps each (a step: {each})", soft_wrap=True, markup=False)

        self.console.print("0/4 steps that every backend can take", style="bold")
        return equal_steps(plans, self.folder, parallel=self.config.parallel, on_chosen=say)

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
